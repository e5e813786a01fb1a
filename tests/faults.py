"""Commands that are killed, or meet a full disk, at a chosen system call.

A small library that is loaded before all others counts the calls that change files below a folder (open for writing,
write, rename, unlink, mkdir, link, truncate, fsync ...), whoever makes them: Python, Arrow, SQLite or
safetensors. At call number n it writes half of what was to be written and kills the process, or says from then on that
the disk is full. Where there is no C compiler, Python's audit events are counted instead: opens, renames,
removals and folders, but not the single writes.

The commands run in forks of one process that has imported everything already, so that a run takes about as long as its
work.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

COUNT, KILL, FULL = 0, 1, 2
SERVER = r"""
import ctypes, errno, json, os, sys, traceback
os.environ["OMP_NUM_THREADS"] = "1"
import moon2_lab.cli.main, moon2_lab.cli.pipeline, moon2_lab.training.trainer, moon2_lab.retrieval.embed
import moon2_lab.data.importers.importer, moon2_lab.data.synthetic.generator, moon2_lab.augment.pipeline
import moon2_lab.augment.consistency, moon2_lab.evaluation.evaluate, moon2_lab.reporting.run_report
import accelerate, safetensors.torch, pyarrow.parquet, pandas, sqlite3, PIL.JpegImagePlugin, cv2
import torch
torch.set_num_threads(1)
pyarrow.set_cpu_count(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
warm = sys.argv[1]  # whatever is imported only when it is needed is imported now, once
os.environ["MOON2_CACHE"] = warm + "/cache"
for words in json.loads(sys.argv[2]):
    moon2_lab.cli.main.main(words)

class Audit:  # where there is no compiler
    EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
    calls, mode = 0, -1
    def fault_arm(self, root, n, mode):
        self.root, self.at, self.calls, self.mode = root.decode(), n, 0, mode
        sys.addaudithook(self.hook)
    def fault_calls(self):
        self.mode = -1
        return self.calls
    def hook(self, event, given):
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.mode < 0 or not (writes or event in self.EVENTS):
            return
        paths = [os.fsdecode(p) for p in given[:2] if isinstance(p, (str, bytes, os.PathLike))]
        if not any(path.startswith(self.root) for path in paths):
            return
        self.calls += 1
        if self.mode == 1 and self.calls == self.at:
            os.kill(os.getpid(), 9)
        if self.mode == 2 and self.calls >= self.at and (writes or event in ("os.mkdir", "os.link")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

lib = ctypes.CDLL(None) if "LD_PRELOAD" in os.environ else Audit()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            os.environ["MOON2_CACHE"] = job["cache"]
            lib.fault_arm(job["root"].encode(), job["n"], job["mode"])
            code = moon2_lab.cli.main.main(job["words"])
            calls = lib.fault_calls()
            with open(job["log"] + ".calls", "w") as file:
                file.write(str(calls))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)
"""


SMALL = (
    "--backbone", "tiny", "--set", "max_steps=4", "save_steps=2", "per_device_train_batch_size=4", "image_size=32",
    "visual_tokens=4", "num_layers=1", "num_threads=1", "device=cpu", "dtype=float32", "query_variants=1",
)


def warm_up(folder: Path) -> list[list[str]]:
    "The commands that make what the others work on: a catalogue, a table to import, a run, a file of vectors."
    shop, run = str(folder / "shop"), str(folder / "run")
    return [
        ["data", "synth", shop, "--products", "30", "--seed", "1"],
        ["train", "--catalog", shop, "--out", run, *SMALL],
        ["embed", run, "--catalog", shop, "--out", str(folder / "vectors.parquet")],
    ]


class Done(NamedTuple):
    "What became of a command."
    code: int  # exit code; -9: killed
    said: str
    calls: int  # that change files below the folder; 0 when it was killed


class Faults:
    "A process whose forks run commands."

    def __init__(self, folder):
        self.folder, self.exact = Path(folder), False
        env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
        if compiler and sys.platform.startswith("linux"):
            shutil.copy(Path(__file__).with_suffix(".c"), self.folder)
            library = self.folder / "faults.so"
            made = subprocess.run(
                [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, self.folder / "faults.c", "-ldl"],
                capture_output=True, text=True,
            )
            self.exact = made.returncode == 0
            env |= {"LD_PRELOAD": str(library)} if self.exact else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.folder), json.dumps(warm_up(self.folder))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=env,
        )

    def __call__(self, root, *words, n=0, mode=COUNT) -> Done:
        "Run `moon2 WORDS`; the n-th call that changes something below `root` is the one."
        log = self.folder / "said.txt"
        Path(f"{log}.calls").unlink(missing_ok=True)
        job = {
            "words": [str(word) for word in words], "root": str(root), "n": n, "mode": mode, "log": str(log),
            "cache": str(self.folder / "cache"),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        calls = Path(f"{log}.calls")
        return Done(code, log.read_text(errors="replace"), int(calls.read_text()) if calls.exists() else 0)

    def close(self) -> None:
        "End the process."
        self.process.stdin.close()
        self.process.wait(30)


def points(calls: int, most: int) -> list[int]:
    "At most so many of 1 .. `calls`, the first and the last among them."
    return sorted({1 + round(place * (calls - 1) / max(1, most - 1)) for place in range(min(most, calls))})


def leftovers(folder) -> list[str]:
    "Locks, temporaries and pieces below a folder."
    named = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
    return [name for name in named if any(part.startswith(".") or part.endswith(".parts") for part in name.split("/"))]
