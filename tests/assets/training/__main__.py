"""Train the adapters of SmolLM2-135M-Instruct and check their answers to questions that they were not trained on.

Needs no GPU. Exits with 1 if too few answers show the effect. The same PyTorch on the same CPU gives the same weights.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.assets.smollm import make_smollm
from tests.assets.training.lesson import Lesson
from tests.assets.training.lessons import LESSONS, TRAINED
from tests.assets.training.train import check, train

ROOT = Path(__file__).parents[3]


def main() -> int:
    by_name = {lesson.name: lesson for lesson in LESSONS}
    parser = argparse.ArgumentParser("python -m tests.assets.training", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(by_name)}; default: all")
    parser.add_argument("--only-check", action="store_true", help="check the stored adapters without training")
    parser.add_argument("--model", type=Path, help="folder of the model; default: .demo/smollm/model")
    parser.add_argument("--out", type=Path, default=TRAINED, help="folder of the adapters; default: %(default)s")
    options = parser.parse_args()
    if unknown := set(options.names) - set(by_name):
        parser.error(f"expected names of {', '.join(by_name)}, got {', '.join(sorted(unknown))}")
    model = options.model or make_smollm(ROOT / ".demo" / "smollm")
    passed = True
    for lesson in [by_name[name] for name in options.names] or LESSONS:
        folder = options.out / lesson.name
        if not options.only_check:
            started_s = time.monotonic()
            loss = train(model, lesson, folder)
            print(f"{lesson.name}: trained in {time.monotonic() - started_s:.0f} s, loss {loss:.3f}", flush=True)
        passed &= _report(lesson, model, folder)
    return 0 if passed else 1


def _report(lesson: Lesson, model: Path, folder: Path) -> bool:
    answers = check(model, lesson, folder)
    for answer in answers:
        print(f"  {'good' if answer.good else 'BAD '}  {answer.question} -> {answer.text!r}")
    good = sum(answer.good for answer in answers)
    size = (folder / "adapter_model.safetensors").stat().st_size
    least = lesson.least * len(answers)
    print(f"{lesson.name}: {good} of {len(answers)} are good, at least {least:.0f} must be; {size} bytes", flush=True)
    return good >= least


if __name__ == "__main__":
    sys.exit(main())
