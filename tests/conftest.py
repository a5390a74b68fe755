"""What all tests share."""
import os
from pathlib import Path

import pytest
from lanes import pytest_runtest_setup, pytest_xdist_make_scheduler  # noqa: F401 hooks
from rlhf_small import make_chain
from slurm_lab import lab  # noqa: F401 a fixture
from small import prepare_text

os.environ.setdefault("WANDB_MODE", "disabled")  # a second a run; tests/test_observe.py tests the tracker by itself
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the kernels run on CPU tensors


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A prepared directory of real text: 500 words, about 40,000 tokens, short documents."""
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def rlhf_chain(small_data, tmp_path_factory) -> dict[str, Path]:
    """What tests of RLHF start from: records, a pretrained model, a reward model."""
    return make_chain(tmp_path_factory.mktemp("chain"), small_data)


@pytest.fixture(scope="module")
def connected():
    """The platform, with this process as the only rank of a job while the module's tests run."""
    from megatron_ext import platform

    device = platform.install("cpu")
    platform.connect(device, 60)
    yield device
    platform.disconnect()


@pytest.fixture(autouse=True)
def umask_stays():
    """A run makes its process's files private from then on; in this process other tests follow."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
