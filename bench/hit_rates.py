"""Hit rates of all cache policies on real routing: ``python -m bench.hit_rates [--threads N]``.

SmolLM2 as a mixture of 30 layers of 8 experts, 2 used, on the part of tests/models/text.txt that its routers were not
fitted to, one token at a time as in generation. The static policy goes by the part that they were fitted to.

Expected: with routing at random every policy would find about 25, 50 and 75 % at those sizes; the text's reuse of
experts from token to token is about 0.4 (bench.moe_quality), so an LRU with room for one token's experts finds that.
No policy finds more than Belady's optimum. In service the same rates are counted (tests/e2e/test_trace.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.models import moe, smollm2

from tensortier.cli import main as tensortier


def text_of(tokens: tuple[int, ...]) -> str:
    import llama_cpp

    vocabulary = llama_cpp.Llama(str(smollm2.path()), vocab_only=True, verbose=False)
    return str(vocabulary.detokenize(list(tokens)).decode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--model", type=Path, help="the mixture; without it, it is built")
    parser.add_argument("--plot", type=Path, help="a figure of the hit rates over sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(args.model or moe.build(folder / "moe.gguf"))
        parts = {"fitted": moe.tokens()[: moe.FIT_TOKENS], "held-out": moe.tokens()[moe.FIT_TOKENS :]}
        for part, tokens in parts.items():
            (folder / f"{part}.txt").write_text(text_of(tokens), encoding="utf-8")
            options = ["--raw", "-ub", "1", "-n", "1", "-t", args.threads, "-q"]
            files = ["-f", str(folder / f"{part}.txt"), "-o", str(folder / f"{part}.trace")]
            if code := tensortier(["trace", model, *files, *options]):
                return code
        plot = [] if args.plot is None else ["--plot", str(args.plot)]
        profile = ["--profile", str(folder / "fitted.trace")]
        return tensortier(["simulate", str(folder / "held-out.trace"), "-m", model, *profile, *plot])


if __name__ == "__main__":
    import llama_cpp._logger

    llama_cpp._logger.set_verbose(False)
    sys.exit(main())
