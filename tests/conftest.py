"Options and environment shared by all tests."
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # nothing here may need the Hub
os.environ["DINOV3_NB_CACHE"] = tempfile.mkdtemp()  # kept features of tests are not the user's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")     # for networks this small, threads mostly wait for each other


def pytest_addoption(parser):
    parser.addoption("--nb-flags", default="", help='nbdev test flags to run as well, such as "slow gpu"')
