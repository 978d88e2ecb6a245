"""Python processes without the seconds that imports take: a server imports everything once and forks a child a command.

A child has its own folder, environment, arguments, output files and exit code, and none of what a test has changed.
`run` stands in for `subprocess.run`, and `Server` is started once by conftest.py.

Some settings, such as HF_HOME, are read when a library is imported. So the server has two stages: "base" has imported
what reads none of the Hub's settings, and "full", which is forked from it, all the rest. `run` takes the last stage
that has read nothing which the command wants otherwise, or else a real process. Without `fork`, or with a GPU (a
driver does not survive a fork), every command is a real process.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

BASE = ("numpy", "torch", "torch.utils.data", "torchvision.transforms.v2", "pandas", "pyarrow.parquet", "pyarrow.dataset", "scipy.special",
        "sklearn.datasets", "sklearn.linear_model", "sklearn.model_selection", "matplotlib.pyplot", "PIL.Image",
        *(f"PIL.{kind}ImagePlugin" for kind in ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Mpo", "Pdf", "Png", "Ppm", "Tga", "Tiff", "WebP")))
FULL = ("transformers.hf_argparser", "transformers.models.dinov3_vit.modeling_dinov3_vit",
        "transformers.models.dinov3_vit.image_processing_dinov3_vit", "transformers.models.dinov3_convnext.modeling_dinov3_convnext",
        "datasets", "accelerate", "bitsandbytes", "timm", "rich.syntax", "starlette.applications", "nbdev.test", "nbdev.showdoc", "nbdev.serve",
        *(f"dinov3_nb.{path.stem}" for path in sorted((Path(__file__).parents[1] / "dinov3_nb").glob("[a-z]*.py"))))
# What these variables say is read when it is used, so each child may have its own; what HUB names, by the libraries of FULL.
LATE = ("PYTEST_", "DINOV3_NB_", "TRACKIO_DIR", "CUDA_VISIBLE_DEVICES", "IN_TEST", "PYTHONIOENCODING", "PATH", "PWD", "OLDPWD",
        "TMPDIR", "COLUMNS", "LINES", "CI", "HF_HUB_DISABLE_PROGRESS_BARS")
HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TIMM_", "TRACKIO_", "TQDM_", "ACCELERATE_", "XDG_CACHE_HOME", "HOME",
       "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
# What a command sees: offline, and no models on this machine, whatever is in the user's cache.
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in CACHES}, "HF_HUB_OFFLINE": "1",
               "HF_HOME": os.environ.get("DINOV3_NB_NO_MODELS", ""), "TRACKIO_DIR": os.environ.get("TRACKIO_DIR", "")}
PLACE = "DINOV3_NB_FORKS"  # the variable that tells tests, and the workers of pytest-xdist, where the server is
REAL_RUN = subprocess.run  # a test may put `run` in its place
CAN_FORK = hasattr(os, "pidfd_open") and not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


# ---------------------------------------------------------------- in the child

def become(request):
    "Take on what a new process begins with: folder, environment, streams, generators."
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if encoding or errors: sys.stdout.reconfigure(encoding=encoding or None, errors=errors or "strict")
    if encoding: sys.stderr.reconfigure(encoding=encoding)
    sys.modules["numpy"].random.seed()  # or all children would draw the same


def execute(words):
    "What `python -c CODE ...` or `python FILE ...` runs; words begin behind `python`."
    if words[0] != "-c":
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)


def run_to_the_end(words):
    "Run as the interpreter would, with what comes after the last line: threads, exit handlers, buffers. Returns the exit code."
    code = 0
    try: execute(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code and stop.code is not code: print(stop.code, file=sys.stderr)
    except BaseException: code = 1; traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    try: sys.stdout.flush()
    except (OSError, ValueError): code = 120
    sys.stderr.flush()
    return code & 0xFF


# ---------------------------------------------------------------- in the server

class Stage:
    "A process that imports modules at its first request and forks a child for each; `following` is forked from it at its own first."
    def __init__(self, control, listener, names, following=None):
        self.control, self.listener, self.names, self.following = control, listener, names, following
        self.connections, self.stages, self.ready, self.selector = {}, {}, False, selectors.DefaultSelector()
        self.watch(control, None)
        self.watch(listener, self.fork_child)
        if following: self.watch(following[0], self.fork_stage)

    def watch(self, source, react): self.selector.register(source, selectors.EVENT_READ, react)

    def serve(self):
        "Answer until `control` is closed, which happens when pytest ends, in whatever way."
        while True:
            events = [key for key, _ in self.selector.select()]
            if any(key.data is None for key in events): return self.stop()
            for key in events: key.data(key.fileobj)

    def prepare(self):
        if self.ready: return
        gc.disable()
        for name in self.names:
            try: importlib.import_module(name)
            except Exception: pass  # the child that wants it says so
        gc.freeze()  # what is imported stays: no child needs to look at it again, and its pages stay shared
        gc.enable()
        self.ready = True

    def leave(self):
        "In a forked process: let go of what is the server's."
        self.selector.close()
        for thing in (self.listener, *self.connections.values(), *([self.following[0]] if self.following else [])): thing.close()
        for number in (self.control, *self.stages.values()): os.close(number)

    def fork_child(self, listener):
        self.prepare()
        connection, _ = listener.accept()
        request = json.loads(connection.makefile("rb").readline())
        pid = os.fork()
        if pid == 0:
            self.leave()
            connection.close()
            become(request)
            os._exit(run_to_the_end(request["words"]))
        connection.sendall(f"{pid}\n".encode())
        self.connections[pid] = connection
        self.watch(os.pidfd_open(pid), lambda source: self.ended(source, pid))

    def ended(self, source, pid):
        "Tell who asked for this child how it ended."
        self.selector.unregister(source)
        os.close(source)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with self.connections.pop(pid) as connection:
            try: connection.sendall(f"{status}\n".encode())
            except OSError: pass  # it has gone

    def fork_stage(self, listener):
        self.prepare()
        self.selector.unregister(listener)
        (_, names), self.following = self.following, None
        control, ours = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.leave()
            os.close(ours)
            Stage(control, listener, names).serve()
            os._exit(0)
        os.close(control)
        listener.close()
        self.stages[pid] = ours

    def stop(self):
        for pid in self.connections: os.killpg(pid, signal.SIGKILL)
        for ours in self.stages.values(): os.close(ours)
        for pid in (*self.connections, *self.stages): os.waitpid(pid, 0)


def main(folder):
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as `dinov3-nb` does where nobody looks at its bars
    base, full = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for listener, name in ((base, "base"), (full, "full")):
        listener.bind(str(folder / name))
        listener.listen(64)
    print("ready", flush=True)
    Stage(os.dup(0), base, BASE, (full, FULL)).serve()


# ---------------------------------------------------------------- in pytest

class Server:
    "The server, from its start to the end of a session; tests find it through the environment."
    def __init__(self, environment):
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "environment.json").write_text(json.dumps(environment))
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen([sys.executable, __file__, str(self.folder)], env=environment, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        self.process.stdout.readline()
        os.environ[PLACE] = str(self.folder)

    def stop(self):
        os.environ.pop(PLACE, None)
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder)


def stage_for(environment):
    "The last stage that has read no setting that differs, or None."
    if PLACE not in os.environ: return None
    theirs = json.loads((Path(os.environ[PLACE]) / "environment.json").read_text())
    differ = [k for k in theirs.keys() | environment.keys() if theirs.get(k) != environment.get(k) and not k.startswith(LATE)]
    if not differ: return "full"
    return "base" if all(k.startswith(HUB) for k in differ) else None


def behind_python(words, environment):
    "The words behind `python` if that is what the command is, or a script of this environment; else None."
    program = shutil.which(words[0], path=environment.get("PATH"))
    if program is None: return None
    if Path(program) == Path(sys.executable): return words[1:] if words[1] == "-c" or words[1].endswith(".py") else None
    return [program, *words[1:]] if Path(program).parent == Path(sys.executable).parent else None


def read_number(connection):
    "The number on the next line."
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part: raise ConnectionError(f"no forks any more: {(Path(os.environ[PLACE]) / 'log').read_text()[-2000:]}")
        line += part
    return int(line)


def run(words, cwd, env, timeout=300):
    "`subprocess.run` with text captured, in a forked child wherever that is the same."
    words, env = [str(word) for word in words], {k: str(v) for k, v in env.items()}
    stage, behind = stage_for(env), behind_python(words, env)
    if stage is None or behind is None:
        return REAL_RUN(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        for path in (stdout, stderr): path.touch()
        connection.connect(str(Path(os.environ[PLACE]) / stage))
        request = {"words": behind, "cwd": str(cwd), "env": env, "stdout": str(stdout), "stderr": str(stderr)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        pid = read_number(connection)  # after the server's imports, if this is its first
        connection.settimeout(timeout)
        try: code = read_number(connection)
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            connection.settimeout(30)
            read_number(connection)
            raise subprocess.TimeoutExpired(words, timeout, stdout.read_text(), stderr.read_text()) from None
        return subprocess.CompletedProcess(words, code, stdout.read_text(), stderr.read_text())


if __name__ == "__main__": main(Path(sys.argv[1]))
