"""`python -m trainer.torchrun ARGUMENTS...`: torchrun, which ends with the status of the rank that failed.

torchrun itself ends with 1 whatever its ranks end with. A Job then tries again what no pod can do better (status 2), and the
service cannot tell a rank that hung (status 3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainer.endings import most_telling


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ranks; gives 0, what a rank ended with, or 128 + the number of the signal that ended it."""
    try:
        run.main(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = most_telling(failure.exitcode for failure in failures)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
