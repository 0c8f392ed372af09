"""Debian's chromium, driven; and what a person does with the rating page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 60
# A headless browser has neither mouse nor finger until it is told.
MOUSE = "primaryPointerType=4,availablePointerTypes=4,primaryHoverType=2,availableHoverTypes=2"


@contextmanager
def chromium(width: int, height: int, *, is_phone: bool = False) -> Iterator[Browser]:
    """A browser window, or a phone's screen with touch."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(programs.values()):
        pytest.skip("no browser is there, and `make chromium` could not fetch it")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    # No sandbox: the browser may run as root, and sees nothing but our own page.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if is_phone:
        metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    else:
        options.add_argument(f"--window-size={width},{height}")
        options.add_argument(f"--blink-settings={MOUSE}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs["chromedriver"])))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """A rater's browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def join(self, url: str, name: str) -> None:
        """From the front page to the first pictures, the help read."""
        self.driver.get(url)
        self.find("#name").send_keys(name)
        self.find("#who button").click()
        self.until("return typeof screen_ !== 'undefined' && isReady && document.getElementById('help').open")
        self.find("#understood").click()

    def press(self, *keys: str) -> None:
        """Keys, one after the other."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def tap(self, selector: str) -> None:
        """As a finger does: where the element is on the screen, whatever lies there."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def wait_for(self, done: int) -> None:
        """Until so many votes are kept and the next pictures are seen."""
        self.until(f"return isReady && screen_.done === {done}")

    def until(self, script: str) -> None:
        """Until a script gives true."""
        WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda driver: driver.execute_script(script))

    def run(self, script: str) -> Any:
        """What a script gives."""
        return self.driver.execute_script(script)

    def find(self, selector: str) -> WebElement:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    @property
    def rater_id(self) -> str:
        """From the address."""
        return self.driver.current_url.rpartition("/")[2].partition("-")[0]

    def complaints(self, allowed: Callable[[str], bool] = lambda message: False) -> list[str]:
        """What the browser's console holds, but for what is allowed."""
        return [entry["message"] for entry in self.driver.get_log("browser") if not allowed(entry["message"])]
