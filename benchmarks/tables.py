"""Write the tables of README.md from results.

    python benchmarks/tables.py               # every file in benchmarks/results/
    python benchmarks/tables.py a.json b.json  # these
"""
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE / "README.md"


def table(head, rows):
    "Markdown; the first column to the left, the others to the right."
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def conditions(result):
    "The machine in one line."
    m = result["machine"]
    device = f"{m['gpu']}, CUDA {m['cuda']}" if m["gpu"] else m["cpu"]
    packages = ", ".join(f"{name} {m[name]}" for name in ("torch", "torchvision", "transformers"))
    return f"*{device}, {m['cores']} cores; {packages}; Python {m['python']}.*"


def frozen_run(r):
    "Seconds, accuracy and memory of the three sides."
    rows = []
    for name, runs in r["sides"].items():
        seconds, first = [run["seconds"] for run in runs], runs[0]
        middle = statistics.median(seconds)
        ratio = "1" if name == "plain" else f"{r['ratio'] if name == 'train' else r['ratio_second']:,.1f}"
        rows.append([name, f"{middle:,.2f}", f"{min(seconds):,.2f} to {max(seconds):,.2f}", ratio,
                     f"{first['accuracy']:.2%}", f"{first['last_accuracy']:.2%}", f"{first['loss']:.6f}",
                     f"{max(run['peak_mb'] for run in runs):,.0f}"])
    head = ["side", "seconds (median)", "spread", "times faster", "best accuracy", "last accuracy",
            "last loss", "peak MB"]
    a = r["arguments"]
    said = (f"{conditions(r)} Batch {a['batch_size']}, {a['epochs']} epochs, validation every "
            f"{a['eval_every_steps']} steps, precision {a['precision'].replace('no', 'float32')}, "
            f"{a['repeats']} repeats. The plain loop sends {r['passes']:,} images through the backbone where "
            f"{r['images']:,} suffice: {r['ceiling']:.2f} times as many. Largest difference between logged "
            f"losses of plain and train: {r['loss_difference']:.1e}.")
    return f"{table(head, rows)}\n\n{said}"


def report(r):
    "Seconds and memory of each part."
    rows = [[p["part"].replace("_", " "), f"{p['seconds']:.1f}", f"{p['peak_megabytes']:,.0f}"] for p in r["parts"]]
    rows.append(["together", f"{r['seconds']:.1f}", f"{r['peak_megabytes']:,.0f}"])
    train, validation, width = r["shape"]
    f = r["found"]
    said = (f"{train:,} training and {validation:,} validation images, width {width}. Of {f['planted']} pictures that occur "
            f"twice {f['copies']} were found; of the first doubtful labels {f['doubtful']:.1%} are wrong; the page has "
            f"{f['page_bytes'] / 1e6:.1f} MB. Neighbours are found {f['ratio']:.1f} times as fast as by sorting. {conditions(r)}")
    return f"{table(['part', 'seconds', 'peak MB'], rows)}\n\n{said}"


def forward(r):
    "Three tables: the backbone, preprocessing, the whole pass."
    name = {"no": "float32", "bf16": "bfloat16 autocast"}
    speeds = table(["precision", "kind", "batch", "images/s", "share of the matrix product"],
                   [[name[f["precision"]], f["kind"], f["batch_size"], f"{f['images_per_second']:.1f}",
                     f"{f['share']:.0%}"] for f in r["forward"]])
    rates = ", ".join(f"{name[k].split()[0]} {v:,.0f}" for k, v in r["matmul_gflops"].items())
    ms = r["preprocess_ms"]
    prepared = table(["preprocessing, one core", "ms an image", "images/s", "of the processor's time"],
                     [[k, f"{v:.2f}", f"{1e3 / v:,.0f}", f"{v / ms['processor']:.2f}"]
                      for k, v in ms.items()])
    whole = table(["workers of the pass", "seconds", "CPU seconds", "of forward + preprocessing alone"],
                  [["default" if p["num_workers"] is None else p["num_workers"], f"{p['wall']:.1f}",
                    f"{p['cpu']:.1f}", f"{p['ratio']:.3f}"] for p in r["pass"]])
    return f"{speeds}\n\nMatrix product, GFLOP/s: {rates}.\n\n{prepared}\n\n{whole}\n\n{conditions(r)}"


def gpu(r):
    "Three tables: the backbone, the pass from files, memory."
    def mb(size): return "" if size is None else f"{size / 1e6:,.0f}"
    speeds = table(["model", "precision", "kind", "batch", "images/s", "ceiling", "share"],
                   [[f["model"], f["precision"].replace("no", "float32"),
                     "compiled" if f["compiled"] else "eager", f["batch_size"],
                     f"{f['images_per_second']:,.0f}", f"{f['ceiling']:,.0f}",
                     f"{f['share']:.0%}"] for f in r["forward"]])
    files = table(["model, from JPEG files", "preprocessing", "images/s"],
                  [[p["model"], p["preprocess"], f"{p['images_per_second']:,.0f}"] for p in r["pass"]])
    memory = table(["model", "weights", "held MB", "peak MB while loading", "peak MB of a forward pass"],
                   [[m["model"], m["kind"], mb(m["held"]), mb(m["peak_loading"]), mb(m["peak"])]
                    for m in r["memory"]])
    frozen = [frozen_run(r["frozen_run"])] if r["frozen_run"] else []
    return "\n\n".join([speeds, files, memory, conditions(r), *frozen])


def startup(r):
    "Seconds of each command, and of the libraries' import."
    base = statistics.median(r["seconds"]["libraries"])
    rows = [[name, f"{statistics.median(v):.2f}", f"{min(v):.2f} to {max(v):.2f}", f"{statistics.median(v) / base:.2f}"]
            for name, v in r["seconds"].items()]
    head = ["command", "seconds (median)", "spread", "of the libraries' import"]
    return f"{table(head, rows)}\n\n{conditions(r)} {r['arguments']['repeats']} repeats, in turn."


def prepare(r):
    "Seconds of each step, the plain way and ours."
    middle = {name: {way: statistics.median(v) for way, v in ways.items()} for name, ways in r["seconds"].items()}
    rows = [[name, f"{m['plain']:,.2f}", f"{m['ours']:,.2f}", f"{m['plain'] / m['ours']:,.1f}"] for name, m in middle.items()]
    a, head = r["arguments"], ["step", "plain, seconds", "ours, seconds", "times faster"]
    return f"{table(head, rows)}\n\n{conditions(r)} {a['rows']:,} images, {a['classes']:,} classes, repeats: {a['repeats']}."


def store(r):
    "Two tables: what each action takes, and how appending grows."
    names = {"append": "append all rows", "open": "open", "find_all": "look up all names",
             "random": f"{r['arguments']['random_rows']:,} random rows, checked", "all": "all rows as one array, checked"}
    sides = r["sides"]
    rows = [[said, *(f"{sides[side][name]:.3f}" for side in sides), f"{sides['SQLite'][name] / sides['store'][name]:.1f}"]
            for name, said in names.items()]
    a = r["arguments"]
    quarters = ", ".join(f"{seconds:.1f}" for seconds in r["quarters"])
    said = (f"{a['rows']:,} rows of {a['row_bytes']:,} bytes; {sides['store']['megabytes']:,.0f} MB in the store, "
            f"{sides['SQLite']['megabytes']:,.0f} in SQLite. Appending took {quarters} s for each quarter of the rows.")
    head = ["seconds", *sides, "times as fast as SQLite"]
    return f"{table(head, rows)}\n\n{said} {conditions(r)}"


def shared_pass(r):
    "Seconds of one process and of two."
    rows = [[world, f"{statistics.median(run['seconds'] for run in runs):.2f}",
             " + ".join(map(str, runs[0]["computed"]))] for world, runs in r["runs"].items()]
    said = f"Two processes take {r['ratio']:.2f} of one process's time. {r['arguments']['repeats']} repeats, in turn."
    return f"{table(['processes', 'seconds (median)', 'images each computed'], rows)}\n\n{said} {conditions(r)}"


def probes(r):
    "What was measured, what was computed from it, and the ratio to the plain way."
    names = {"neighbours": "nearest neighbours", "ridge": "ridge regression", "logistic": "logistic regression",
             "bank": "bank of 13 heads", "plain": "plain (scikit-learn)"}
    def size(m): return [f"{m['images']:,} x {m['width']:,} x {m['classes']:,}", names[m["kind"]]]
    rows = [[*size(m), f"{m['seconds']:,.1f}", f"{m['megabytes']:,.0f}", f"{m['features_megabytes']:,.0f}", f"{m['accuracy']:.2%}"]
            for m in r["measured"]]
    measured = table(["images x width x classes", "method", "seconds", "MB besides", "MB of features", "accuracy"], rows)
    rows = [[*size(c), f"{c['operations'] / 1e12:,.2f}", f"{c['gflops']:,.0f}", f"{c['seconds'] / 60:,.1f}", f"{c['megabytes'] / 1e3:,.1f}"]
            for c in r["computed"]]
    computed = table(["computed", "method", "TFLOP", "GFLOP/s, as measured", "minutes", "GB besides"], rows)
    ratios = ", ".join(f"{ratio:.1f} at {name.replace('x', ' x ')}" for name, ratio in r["ratio"].items())
    said = f"Times faster than the plain way, logistic regression: {ratios}."
    return f"{measured}\n\n{said}\n\n{computed}\n\n{conditions(r)}"


def ladder_last(r):
    "Seconds of an epoch from images, from pixels in memory and from kept tokens."
    sides, rows = r["sides"], []
    middle = {name: statistics.median(side["seconds"]) for name, side in sides.items()}
    for name, side in sides.items():
        rows.append([name, f"{middle[name]:.2f}", f"{min(side['seconds']):.2f} to {max(side['seconds']):.2f}",
                     f"{middle[name] / middle['tokens']:.2f}", f"{side['losses'][-1]:.6f}"])
    a, head = r["arguments"], ["the last blocks learn from", "seconds an epoch (median)", "spread", "times tokens", "last loss"]
    said = (f"{a['images']} images, batch {a['batch_size']}, the last {a['blocks']} of 12 blocks, tokens in {a['feature_dtype']}, "
            f"{a['epochs']} epochs in turn. The pass that keeps the tokens took {r['once']:.1f} s, once. Largest difference "
            f"between the losses: {r['loss_difference']:.1e}.")
    return f"{table(head, rows)}\n\n{said} {conditions(r)}"


def ladder_tuned(r):
    "Images a second and memory of the loop by hand and of `train`."
    rows = []
    for name, speeds in r["images_per_second"].items():
        runs = r["sides"][name]
        cuda = "" if runs[0]["cuda_mb"] is None else f"{max(run['cuda_mb'] for run in runs):,.0f}"
        rows.append([name, f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}",
                     f"{max(run['peak_mb'] for run in runs):,.0f}", cuda, f"{runs[0]['curve'][-1][0]:.5f}"])
    a, head = r["arguments"], ["side", "images a second (median)", "spread", "peak MB", "CUDA, peak MB", "last loss"]
    said = (f"{a['images']} images, batch {a['batch_size']}, {a['epochs']} epochs, precision "
            f"{a['precision'].replace('no', 'float32')}, {a['repeats']} repeats in turn. `train` is {r['ratio']:.2f} times as fast. "
            f"Largest difference between the losses: {r['loss_difference']:.1e}.")
    return f"{table(head, rows)}\n\n{said} {conditions(r)}"


def export(r):
    "Images a second of each way to run an exported classifier."
    parts = []
    for name, model in r["models"].items():
        rows = [[s["way"], s["batch_size"], f"{s['images_per_second']:.1f}", f"{s['ratio']:.2f}", f"{s['share']:.0%}"]
                for s in model["speeds"]]
        sizes = "; ".join(f"{way.removeprefix('onnxruntime ')} {size / 1e6:.0f} MB" for way, size in model["bytes"].items())
        head = [name, "batch", "images/s", "of PyTorch float32", "of its matrix product"]
        parts.append(f"{table(head, rows)}\n\n{model['gflop']:.2f} GFLOP an image; logits differ by {model['difference']:.0e}; {sizes}.")
    rates = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in r["matmul_gflops"].items())
    threads = "one thread" if r["machine"]["threads"] == 1 else f"{r['machine']['threads']} threads"
    said = f"Matrix product, 10^9 operations a second: {rates}; {threads}, onnxruntime {r['machine']['onnxruntime']}. {conditions(r)}"
    return "\n\n".join([*parts, said])


def main():
    files = [Path(f) for f in sys.argv[1:]] or sorted((HERE / "results").glob("*.json"))
    text = README.read_text()
    for file in files:
        result = json.loads(file.read_text())
        arguments = result["arguments"]
        each_epoch = result["benchmark"] == "frozen_run" and arguments["eval_every_steps"] == 47  # of 376 images
        name = result["benchmark"] + ("_pair" if arguments.get("pair") else "_epoch" if each_epoch else "")
        made = {"frozen_run": frozen_run, "forward": forward, "gpu": gpu, "store": store, "shared_pass": shared_pass,
                "startup": startup, "prepare": prepare, "probes": probes, "report": report, "ladder_last": ladder_last,
                "ladder_lora": ladder_tuned, "ladder_all": ladder_tuned, "export": export}[result["benchmark"]](result)
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
        print(f"{file}: {name}" if found else f"{file}: README.md has no place for {name}")
    README.write_text(text)


if __name__ == "__main__": main()
