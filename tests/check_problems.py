#!/usr/bin/env python3
"""Schedules every problem of a folder and lets the independent checker judge.

usage: check_problems.py [--ctl PATH] [--filter TEXT] [--jobs N] [schedule flags ...]

Reads PIPEWEAVER_SHARED (default ../shared beside the repository): problems/, problems/floor.json,
problems/peers.json and tools/check_schedule.py. Prints one line per problem and one per family; exits 1
when a schedule is invalid, late or missing. Unknown flags go to `pipeweaverctl schedule`.
Gaps: to the bound of the problem format, to the tighter flow bound (search/problem/bound.h), and the floor's.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def family(name):
    """The problem's name without its seed; the v- and text- problems differ in size, not in seed."""
    if name.startswith(("v-", "text-")):
        return "-".join(name.split("-")[:2]) if name.startswith("v-") else "text"
    return re.sub(r"-\d+$", "", name)


def judge(path, args, extra, checker):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "schedule.json"
        start = time.monotonic()
        with open(out, "w") as f:
            ran = subprocess.run([args.ctl, "schedule", str(path), *extra], stdout=f, stderr=subprocess.PIPE, text=True)
        wall = time.monotonic() - start
        if ran.returncode != 0:
            return None, wall, f"exit {ran.returncode}: {ran.stderr.strip()[:200]}"
        checked = subprocess.run([sys.executable, str(checker), str(path), str(out)], capture_output=True, text=True)
        if checked.returncode != 0:
            return None, wall, checked.stdout.strip()
        figures = dict(re.findall(r"(\w+)=([\d.]+)", checked.stdout))
        figures["flow_lower_bound_ns"] = json.loads(out.read_text())["flow_lower_bound_ns"]
        return figures, wall, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctl", default=str(ROOT / "bazel-bin/server/ctl/pipeweaverctl"))
    parser.add_argument("--filter", default="")
    parser.add_argument("--jobs", type=int, default=1)
    args, extra = parser.parse_known_args()
    shared = Path(os.environ.get("PIPEWEAVER_SHARED", ROOT.parent / "shared"))
    problems = shared / "problems"
    if not problems.is_dir():
        print(f"skipped: {problems} missing (set PIPEWEAVER_SHARED)")
        return 0
    floor = json.loads((problems / "floor.json").read_text())
    peers = json.loads((problems / "peers.json").read_text())
    paths = sorted(p for p in problems.glob("*.json.gz") if re.search(args.filter, p.name))
    checker = shared / "tools" / "check_schedule.py"

    failed, families = 0, {}
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda p: judge(p, args, extra, checker), paths)
        for path, (figures, wall, error) in zip(paths, results):
            name = path.name[: -len(".json.gz")]
            if figures is None:
                failed += 1
                print(f"{name:18} INVALID {error}", flush=True)
                continue
            makespan, bound = int(figures["makespan_ns"]), int(figures["lower_bound_ns"])
            row = {"gap": makespan / bound - 1, "flow_gap": makespan / int(figures["flow_lower_bound_ns"]) - 1}
            if name in floor:
                row["floor_gap"] = floor[name]["gap"]
                row["of_floor"] = makespan / floor[name]["naive_makespan_ns"]
            if name in peers:
                row["of_peer"] = makespan / peers[name]["makespan_ns"]
                if name in floor:
                    row["of_both"] = makespan / min(peers[name]["makespan_ns"], floor[name]["naive_makespan_ns"])
            families.setdefault(family(name), []).append(row)
            print(f"{name:18} {show(row)} wall={wall:.2f}s", flush=True)
    print()
    for name, rows in families.items():
        keys = [k for k in rows[0] if all(k in r for r in rows)]
        print(f"{name:18} {show({k: statistics.mean(r[k] for r in rows) for k in keys})}")
    print(f"{len(paths) - failed} of {len(paths)} valid")
    return 1 if failed else 0


def show(row):
    percent = ("gap", "flow_gap", "floor_gap")
    return " ".join(f"{k}={100 * v:6.2f}%" if k in percent else f"{k}={v:.4f}" for k, v in row.items())


if __name__ == "__main__":
    sys.exit(main())
