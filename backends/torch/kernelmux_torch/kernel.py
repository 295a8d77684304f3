"""What the kernels of this backend share: torch calls, of which a card may make several launches."""

from __future__ import annotations

from kernelmux.contract import CurrentStream, Efficiency

FLOATS = ("f32", "bf16", "f16")


class TorchKernel(CurrentStream):
    """A kernel of torch calls; `on_card` are its launches there, at most, for a library may split its work."""

    on_card = 1
    efficiency = Efficiency(reading=0.7, multiplying=0.3)

    @property
    def launches(self) -> int:  # type: ignore[override]
        return self.on_card if self.device.kind != "cpu" else 1
