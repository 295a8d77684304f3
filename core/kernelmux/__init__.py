"""kernelmux runs one LLM compute graph on many kernel libraries; a policy file chooses the kernel of every op.

    model = kernelmux.load("model.gguf")
    plan = model.plan(policy="policy.toml")
    for text in model.generate("Hello", plan=plan):
        print(text, end="")

Importing this package loads no framework: torch comes with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelmux.errors import KernelmuxError
    from kernelmux.run.model import Model, PromptOptions, load

__version__ = "0.1.0"
__all__ = ["KernelmuxError", "Model", "PromptOptions", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "KernelmuxError":
        from kernelmux.errors import KernelmuxError

        return KernelmuxError
    if name in __all__:
        from kernelmux.run import model

        return getattr(model, name)
    raise AttributeError(f"module 'kernelmux' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
