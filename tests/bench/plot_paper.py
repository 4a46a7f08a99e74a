#!/usr/bin/python3
"""Draws what paper_bench printed: plot_paper.py RESULTS.jsonl DIRECTORY.

One SVG for each part that has something to see: gains over baselines, the
ablation, the trace, sub-microbatch sizes, search time, replicas.
"""

import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def read(path):
    """Lines of the file by their part."""
    parts = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            parts.setdefault(row["bench"], []).append(row)
    return parts


def save(figure, directory, name):
    path = os.path.join(directory, name + ".svg")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def grouped_bars(axes, groups, series, values):
    """values[group][series], or None where there is none."""
    width = 0.8 / len(series)
    for k, name in enumerate(series):
        at = [g + (k - (len(series) - 1) / 2) * width
              for g in range(len(groups))]
        heights = [values[g].get(name) for g in groups]
        axes.bar([x for x, h in zip(at, heights) if h is not None],
                 [h for h in heights if h is not None], width, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(fontsize="small")


def plot_setups(rows, directory):
    shown = ["megatron", "interleaved-1f1b", "nnscaler*", "optimus*"]
    values = {}
    for row in rows:
        if row["strategy"] in shown and "planner_gain_mean" in row:
            values.setdefault(row["setup"], {})[row["strategy"]] = (
                100 * row["planner_gain_mean"])
    figure, axes = plt.subplots(figsize=(9, 4.5))
    axes.axhspan(15.6, 97.3, color="0.92", label="paper: +15.6 to +97.3 %")
    grouped_bars(axes, list(values), shown, values)
    axes.set_ylabel("time of baseline over planner's, less 1 [%]")
    axes.set_title("Gain over baselines, mean of batches")
    save(figure, directory, "setups")


def plot_ablation(rows, directory):
    names = [row["step"] for row in rows]
    first = rows[0].get("mean_makespan_s")
    figure, axes = plt.subplots(figsize=(9, 4.5))
    values = {}
    for row in rows:
        bars = values.setdefault(row["step"], {})
        if "mean_makespan_s" in row and first:
            bars["here"] = 100 * row["mean_makespan_s"] / first
        if "paper_makespan_s" in row:
            bars["paper"] = 100 * row["paper_makespan_s"] / 26.13
    grouped_bars(axes, names, ["here", "paper"], values)
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_ylabel("makespan [% of megatron]")
    axes.set_title("vlm-s, one idea after the other")
    save(figure, directory, "ablation")


def plot_trace(rows, directory):
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for name in ["megatron", "interleaved-1f1b", "nnscaler*", "optimus*",
                 "portfolio"]:
        points = [(r["step"], r[name]) for r in rows if r[name] is not None]
        axes.plot(*zip(*points), label=name, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("makespan [s]")
    axes.set_ylim(bottom=0)
    axes.set_title("vlm-s, images come and go")
    axes.legend()
    save(figure, directory, "trace")


def plot_sizes(rows, directory):
    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in [("mean_makespan_s", "planned"),
                       ("mean_bound_s", "lower bound")]:
        axes.plot([r["images"] for r in rows], [r[key] for r in rows],
                  marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images of a sub-microbatch")
    axes.set_ylabel("makespan [s]")
    axes.set_title("vlm-s")
    axes.legend()
    save(figure, directory, "sizes")


def plot_scaling(rows, directory):
    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in [("build_ms", "split and cost"),
                       ("search_ms_1_evals", "first plan"),
                       ("search_ms_64_evals", "64 evaluations")]:
        points = sorted((r["stage_pairs"], r[key]) for r in rows if key in r)
        axes.plot(*zip(*points), "o", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("stage pairs of a step")
    axes.set_ylabel("time [ms]")
    axes.set_title("vlm-s: 4 to 1024 microbatches, 2 to 64 ranks")
    axes.legend()
    save(figure, directory, "scaling")


def plot_replicas(rows, directory):
    values = {}
    for row in rows:
        values.setdefault(row["setup"], {})[row["mode"]] = (
            row["slowest_makespan_s"])
    figure, axes = plt.subplots(figsize=(6, 4))
    grouped_bars(axes, list(values), list(dict.fromkeys(
        row["mode"] for row in rows)), values)
    axes.set_ylabel("makespan of the slowest replica [s]")
    axes.set_title("All replicas of a step")
    save(figure, directory, "replicas")


PLOTS = {
    "setups": plot_setups,
    "ablation": plot_ablation,
    "trace": plot_trace,
    "sizes": plot_sizes,
    "scaling": plot_scaling,
    "replicas": plot_replicas,
}


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: plot_paper.py RESULTS.jsonl DIRECTORY")
    for part, rows in read(sys.argv[1]).items():
        if part in PLOTS:
            PLOTS[part](rows, sys.argv[2])


if __name__ == "__main__":
    main()
