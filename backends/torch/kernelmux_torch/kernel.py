"""What the kernels of this backend share: torch calls, of which a card may make several launches."""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux.contract import CurrentStream, Device, Efficiency

FLOATS = ("f32", "bf16", "f16")


class TorchKernel(CurrentStream):
    """A kernel of torch calls; `on_card` are its launches there, at most, for a library may split its work."""

    on_card = 1
    efficiency = Efficiency(reading=0.7, multiplying=0.3)

    @property
    def launches(self) -> int:  # type: ignore[override]
        return self.on_card if self.device.kind != "cpu" else 1


def best_of(known: Mapping[str, float], device: Device) -> float:
    """What is known of the first of these features that a processor has; of one of none it stands last, under ""."""
    return next(value for feature, value in known.items() if not feature or feature in device.features)
