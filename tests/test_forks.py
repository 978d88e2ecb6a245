"A forked command is what a process of its own would be, and a real process wherever it could not be the same."
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from forks import ENVIRONMENT

pytestmark = pytest.mark.skipif(not forks.CAN_FORK, reason="every command is a real process here")
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get('DINOV3_NB_TELL'), __name__, sys.path[0]]))"


def python(code, *words, cwd, **environment):
    return forks.run([sys.executable, "-c", code, *words], cwd, {**ENVIRONMENT, **environment})


@pytest.mark.parametrize("code", [TELL, f"{TELL}; sys.exit('over')", "import sys; sys.exit(300)", "sys.exit()",
                                  "import sys; print('é', file=sys.stderr); sys.stdout.buffer.write(b'a\\r\\nb')", "1/0",
                                  "import atexit, threading, time; atexit.register(print, 'last'); "
                                  "threading.Thread(target=lambda: (time.sleep(0.1), print('first'))).start()"])
def test_a_forked_command_ends_like_a_real_one(code, tmp_path):
    environment = {**ENVIRONMENT, "DINOV3_NB_TELL": "something"}
    real = subprocess.run([sys.executable, "-c", code, "a", "b c"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    ours = python(code, "a", "b c", cwd=tmp_path, DINOV3_NB_TELL="something")
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_what_a_child_does_stays_in_it(tmp_path):
    for _ in range(2):
        done = python("import os, torch; print(torch.initial_seed(), hasattr(torch, 'spoilt'), os.environ.get('DINOV3_NB_SPOILT')); "
                      "torch.manual_seed(7); torch.spoilt = os.environ['DINOV3_NB_SPOILT'] = '1'; os.chdir('/')", cwd=tmp_path)
        assert done.stdout.split()[1:] == ["False", "None"] and done.stdout.split()[0] != "7", done.stderr


def test_a_script_is_run_as_one(tmp_path):
    (tmp_path / "beside.py").write_text("word = 'found'")
    (tmp_path / "script.py").write_text("import beside, sys\nif __name__ == '__main__': print(beside.word, sys.argv)")
    done = forks.run([sys.executable, "script.py", "x"], tmp_path, ENVIRONMENT)
    assert done.stdout == "found ['script.py', 'x']\n", done.stderr


def test_one_that_takes_too_long_is_killed(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        forks.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], tmp_path, ENVIRONMENT, 0.5)
    assert not Path("/proc", caught.value.stdout.strip()).exists()
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", cwd=tmp_path)
    assert killed.returncode == -9


@pytest.mark.parametrize("change, stage", [({}, "full"), ({"TRACKIO_DIR": "x", "CUDA_VISIBLE_DEVICES": ""}, "full"), ({"HF_HOME": "x"}, "base"),
                                           ({"HF_HUB_OFFLINE": "0", "https_proxy": "x"}, "base"), ({"PYTHONHASHSEED": "1"}, None), ({"OMP_NUM_THREADS": "7"}, None)])
def test_what_was_read_at_import_is_never_stale(change, stage, tmp_path):
    assert forks.stage_for({**ENVIRONMENT, **change}) == stage
    if stage == "base":
        done = python("import sys, huggingface_hub.constants as c; print(c.HF_HOME, c.HF_HUB_OFFLINE)", cwd=tmp_path, **change)
        assert done.stdout == f"{change.get('HF_HOME', ENVIRONMENT['HF_HOME'])} {change.get('HF_HUB_OFFLINE') != '0'}\n", done.stderr


def test_encoding_of_the_output(tmp_path):
    done = python("print('é')", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "UnicodeEncodeError" in done.stderr
