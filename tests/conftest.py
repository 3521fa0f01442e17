"""Settings every test shares; they must be in place before jax starts."""

import gc
import os
import pathlib
import signal

FLAGS = (
    "--xla_force_host_platform_device_count=4",  # 1 device = 4 devices is tested everywhere
    # Tests are bound by compilation, not by arithmetic: these make it four times as fast.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
CACHE.mkdir(parents=True, exist_ok=True)

# What a shell runs in the background ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # programs that tests start share it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis  # noqa: E402
import jax  # noqa: E402

from dyntoken.registry import load_plugins  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("dyntoken", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("dyntoken")
# The product tests take whatever is registered: methods and backbones of your own, too.
load_plugins(os.environ.get("DYNTOKEN_PLUGINS", ""))


def pytest_collection_finish() -> None:
    """What is imported stays: the collector of garbage need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(10_000)
