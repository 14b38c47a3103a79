"""A soak: one chain, killed at random again and again, has to finish with the digests of an undisturbed one.

    python -m tests.faults.soak [--kills 20] [--seed 0] [--longest 60] [KEY.PATH=VALUE ...]          (make soak)

Each time the chain (the demo, unless settings make it smaller) runs for a random while; then one of its workers, its
driver, or all of its processes get SIGKILL, or the driver gets SIGTERM or SIGINT; unless it was a worker, the same
command is given again. When it finishes too early, the outputs of one of its trainings are deleted. Exit code 0 when
the kills are done, the chain has finished, the output digest of every node is that of an undisturbed run (but for the
report, which names its runs), and MLflow has every metric of every journal once; 1 otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_GIVE_UP = 3600.0
HOW = ("worker", "worker", "driver", "all", "SIGTERM", "SIGINT")


def command(settings: Sequence[str]) -> list[str]:
    """The chain's command line."""
    return [sys.executable, "-m", "pipeline.run", *settings]


def environment(root: Path) -> dict[str, str]:
    """Of a chain with a root of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**kept, "SPARTA_RUNS": str(root)}


def start(root: Path, settings: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """The chain in a session of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
    with log.open("ab") as output:
        return subprocess.Popen(
            command(settings), env=environment(root), stdout=output, stderr=output, start_new_session=True
        )


def strike(child: "subprocess.Popen[bytes]", how: str, rng: random.Random) -> str:
    """Disturb the chain in one way; says what was hit."""
    driver, below = psutil.Process(child.pid), processes_below(child)
    if how == "worker":  # one process of Ray, FFCV or the driver's own
        workers = [p for p in below if any(name in _name(p) for name in ("ray::", "write_job"))]
        if not workers:
            return ""
        victim = rng.choice(workers)
        said = _name(victim)
        _kill(victim)
        return said
    if how == "all":
        for process in (driver, *below):
            _kill(process)
    elif how == "driver":
        child.kill()
    else:
        child.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
    return how


def processes_below(child: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """All that a chain has started; none when it has just ended."""
    try:
        return psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:60]
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def reap(child: "subprocess.Popen[bytes]", below: Sequence[psutil.Process]) -> int:
    """Wait for the driver, and for what it left behind: Ray notices by itself that its driver is gone."""
    code = child.wait(120)
    _, alive = psutil.wait_procs(below, timeout=20)
    for process in alive:
        _kill(process)
    return code


def digests(root: Path) -> dict[str, str]:
    """The output digest of every finished node."""
    found = {}
    for path in root.glob("*/*/*/*/artifact.json"):
        record = json.loads(path.read_text())
        found[f"{record['stage']}:{record['branch']}"] = record["output_digest"]
    return found


def soak(root: Path, settings: Sequence[str], *, kills: int, seed: int, longest: float, log: Path) -> Counter[str]:
    """Disturb the chain `kills` times, then let it finish; how often what was hit. RuntimeError when it fails."""
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    while sum(hit.values()) < kills:
        child, disturbed = start(root, settings, log), False
        while (code := _wait(child, rng.uniform(3.0, longest))) is None and sum(hit.values()) < kills:
            how = rng.choice(HOW)
            below = processes_below(child)
            if not (said := strike(child, how, rng)):
                continue
            hit[how] += 1
            disturbed = True
            print(f"{sum(hit.values()):>3}/{kills}  {how:<8} {said}", flush=True)
            if how != "worker":  # which the chain mends by itself
                reap(child, below)
                break
        if code and not disturbed:
            raise RuntimeError(f"the chain ended with exit code {code} undisturbed; see {log}")
        if code == 0 and sum(hit.values()) < kills:
            _begin_again(root, rng)
        if child.poll() is None and (code := child.wait(_GIVE_UP)) == 0:
            return hit
    child = start(root, settings, log)
    if code := child.wait(_GIVE_UP):
        raise RuntimeError(f"the chain ended with exit code {code}; see {log}")
    return hit


def _wait(child: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """The exit code, or None when it has not ended in this time."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _begin_again(root: Path, rng: random.Random) -> None:
    """Delete the outputs of one finished training, so that there is something left to disturb."""
    finished = sorted(root.glob("*/pretrain/*/*/artifact.json")) + sorted(root.glob("*/transfer/*/*/artifact.json"))
    victim = rng.choice(finished).parent
    print(f"      finished early; {victim.parent.name} is made again", flush=True)
    shutil.rmtree(victim)


def lost_or_doubled(root: Path, name: str) -> list[str]:
    """Finished runs that MLflow does not have, and entries of their journals that it does not have exactly once."""
    from pipeline.tracking.client import open_client
    from pipeline.tracking.journal import read_journal
    from pipeline.tracking.spool import Spool, plain_key

    spool, uri = Spool(root / name), f"sqlite:///{root}/mlflow.db"
    client = open_client(uri)
    found = []
    for record in spool.records():
        run_id = spool.delivered(uri, record.key).run_id
        if record.status != "FINISHED":
            continue
        if run_id is None:
            found.append(f"{record.name} is not in MLflow")
            continue
        wanted: dict[str, Counter[tuple[int, float]]] = {}
        for entry in (entry for journal in record.journals for entry in read_journal(spool.root / journal)[0]):
            for key, value in entry.metrics.items():
                wanted.setdefault(plain_key(key), Counter())[entry.step, value] += 1
        for key, expected in wanted.items():
            got = Counter((point.step, point.value) for point in client.get_metric_history(run_id, key))
            if got != expected:
                lost, more = (expected - got).total(), (got - expected).total()
                found.append(f"{record.name} {key}: {lost} of {expected.total()} points lost, {more} too many")
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Nodes whose digests are not the same."""
    keys = (one.keys() | other.keys()) - {"report:page"}
    return sorted(key for key in keys if one.get(key) != other.get(key))


def main() -> int:
    """Run the soak and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY.PATH=VALUE", help="of the chain")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds that the chain is left alone at most")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        place, begin = Path(scratch), time.monotonic()
        log = Path(tempfile.gettempdir()) / "soak.log"
        log.unlink(missing_ok=True)
        whole = start(place / "undisturbed", options.settings, log)
        if whole.wait(_GIVE_UP):
            print(f"soak: the undisturbed chain failed; see {log}")
            return 1
        hit = soak(
            place / "disturbed",
            options.settings,
            kills=options.kills,
            seed=options.seed,
            longest=options.longest,
            log=log,
        )
        expected, found = digests(place / "undisturbed"), digests(place / "disturbed")
        (chain,) = {path.parent.name for path in (place / "disturbed").glob("*/report.html")}
        faults = [f"{key} differs" for key in differing(expected, found)]
        faults += lost_or_doubled(place / "disturbed", chain)
        counts = ", ".join(f"{n} x {how}" for how, n in sorted(hit.items()))
        result = "the same digests, no metric lost or doubled" if not faults else "; ".join(faults)
        seconds = time.monotonic() - begin
        print(f"soak: {sum(hit.values())} kills ({counts}) in {seconds:.0f} s, {len(found)} nodes: {result}")
        return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
