"""The process in which a method is tested: it may hang, exit, print or chdir without harm to the kit.

    python -m tsdfm_bench.conformance.worker JOB RESULTS

JOB is a JSON file (target, checks, what is done already), RESULTS a file to which one JSON line per event is appended:
the plan first, then a start and a result for every check of every setting. The parent reads along and knows, when this
process dies or stays silent, which check it was in. stdout is never used. If the parent is gone, this process goes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tsdfm_bench.conformance.catalogue import CHECKS, Check
from tsdfm_bench.conformance.report import Failed, Result, Skipped, Verdict
from tsdfm_bench.conformance.subject import Broke, Refused, Subject, Target, settings_of, vocabulary
from tsdfm_bench.errors import BenchError
from tsdfm_bench.registry import one_line

Tell = Callable[..., None]
_LOOK_S = 1.0


def main(arguments: list[str]) -> None:
    """Run what the job file asks for."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    threading.Thread(target=_leave_with, args=(job["parent"],), daemon=True).start()
    with Path(arguments[1]).open("a", encoding="utf-8") as file:

        def tell(**event: object) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        run_checks(Target.from_json(job["target"]), job["checks"], job["done"], tell)
        tell(event="end")


def _leave_with(parent: int) -> None:
    """End this process when the one that asked has ended, however that happened."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def run_checks(target: Target, wanted: Sequence[str], finished: Iterable[Sequence[str]], tell: Tell) -> None:
    """Run checks in this process.

    Args:
        target: what is tested.
        wanted: ids of the checks.
        finished: (check, setting, verdict) of what need not be done again.
        tell: given every event as keywords.
    """
    tell(event="start", check="contract", setting="")
    try:
        registry = target.registry()
        cls = registry.load("methods", target.method)
        settings = settings_of(cls.info, target.options)
        words = vocabulary(target, cls.info, registry)
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, BenchError) else one_line(error)
        tell(event="broken", seen=text)
        return
    tell(event="plan", settings=[str(setting) for setting in settings])
    checks = [check for check in CHECKS if check.id in wanted]
    done = {(check, setting): verdict for check, setting, verdict in finished}
    first = str(settings[0])
    for setting in settings:
        subject = Subject(cls, target, setting, words)
        for check in checks:
            key = (check.id, str(setting))
            if key in done or (check.once and setting is not settings[0]):
                continue
            missing = _missing(check, key[1], first, done)
            if missing:
                result = Result(*key, "skipped", f"needs '{missing}'")
            else:
                tell(event="start", check=check.id, setting=key[1])
                result = _one(check, subject)
            done[key] = result.verdict
            tell(event="result", **vars(result))


def _missing(check: Check, setting: str, first: str, done: dict[tuple[str, str], str]) -> str | None:
    """A check that this one needs and that has not passed."""
    for need in check.needs:
        verdict = done.get((need, setting)) or done.get((need, first))
        if verdict is not None and verdict != "pass":
            return need
    return None


def _one(check: Check, subject: Subject) -> Result:
    started = time.perf_counter()
    verdict: Verdict
    with _restored():
        try:
            verdict, seen = "pass", check.run(subject)
        except Failed as error:
            verdict, seen = "fail", str(error)
        except Skipped as error:
            verdict, seen = "skipped", str(error)
        except Refused as error:
            verdict, seen = "skipped", f"refused: {error}"
        except Broke as error:
            verdict, seen = "fail", str(error)
        except BaseException as error:
            text = str(error) if isinstance(error, BenchError) else one_line(error)
            verdict, seen = "fail", text
    return Result(check.id, str(subject.setting), verdict, seen, time.perf_counter() - started)


@contextmanager
def _restored() -> Iterator[None]:
    """What a method may spoil for the next check is put back."""
    import torch

    cwd, environment = Path.cwd(), dict(os.environ)
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.set_float32_matmul_precision(precision)


if __name__ == "__main__":
    main(sys.argv[1:])
