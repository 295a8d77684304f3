"""Every backend that is installed, held against the whole suite on CUDA: captured against eager as well."""

import pytest
import torch

from kernelmux.conformance import suite
from kernelmux.contract import registry
from kernelmux.errors import BackendError


def refused(reason):
    """A test that is skipped: pytest takes no lambda for one."""

    @pytest.mark.skip(reason=reason)
    def test():
        """Stands for a backend."""

    return test


if torch.cuda.is_available():
    for _name in registry.current().backends:
        try:
            globals()[f"Test{_name.capitalize()}"] = suite(_name, device="cuda")
        except BackendError as _error:
            # Installed, and not for this device: it says so.
            globals()[f"test_{_name}"] = refused(str(_error))
else:

    def test_every_backend_on_cuda():
        """Stands for all of them where no device can be asked."""
