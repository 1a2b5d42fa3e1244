"""How good the test mixture of experts is: ``python -m bench.moe_quality [FILE]``.

Expected on the held-out part of tests/models/text.txt: perplexity about 1.3 times SmolLM2's, reuse of experts
from token to token about 0.4 (0.25 = 2/8 if routing were random), next-layer prediction about 0.87, larger
weight near 0.5.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.models import llamacpp, moe, smollm2


def measure(path: Path) -> dict[str, float]:
    """Figures of the mixture in ``path`` next to the model it is made from."""
    held_out = moe.tokens()[moe.FIT_TOKENS :]
    original, _ = llamacpp.evaluate(smollm2.path(), held_out)
    logits, routing = moe.evaluate(path, held_out)
    return {
        "tokens": len(held_out),
        "perplexity, original": llamacpp.perplexity(original, held_out),
        "perplexity, mixture": llamacpp.perplexity(logits, held_out),
        "experts used by the token before": routing.reuse,
        "the same if routing were random": moe.N_USED / moe.N_EXPERT,
        "next layer's experts predicted": routing.predicted,
        "larger of the two weights": routing.top_weight,
        "least used expert's share": float(routing.load.min()),
        "most used expert's share": float(routing.load.max()),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            path = Path(sys.argv[1])
        else:
            start = time.perf_counter()
            path = moe.build(Path(folder) / "moe.gguf")
            print(f"{'seconds to build':<34}{time.perf_counter() - start:8.1f}")
        for label, value in measure(path).items():
            print(f"{label:<34}{value:8.3f}")


if __name__ == "__main__":
    import llama_cpp._logger

    llama_cpp._logger.set_verbose(False)
    main()
