"""What each block is worth at inference, beside how lazy it is: every source of a study without one block at a time.

python benchmarks/study/drop.py --config benchmarks/study/minilm.yaml --out benchmarks/study/drop.json
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser

from inflection_fast import Monitor, MonitorConfig, drop
from inflection_fast.atomic import write_json
from inflection_fast.quantities.rank import Rank
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.store import Store
from inflection_fast.study.training_loop import batch_of, evaluate, forward
from inflection_fast.study.work import Work

BATCHES = 8  # in which attention is looked at


def main() -> None:
    """Writes one row per source, and prints it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config")
    parser.add_argument("--out", type=Path)
    parser.add_class_arguments(StudyConfig, None)
    args = parser.instantiate(parser.parse_args())
    config = StudyConfig(**{name: getattr(args, name) for name in StudyConfig.__dataclass_fields__})
    work = Work(config, Store.of(config))
    rows = []
    for path in sorted((Path(config.output) / "sources").glob("*.json")):
        transfer, _, regime = path.stem.rpartition("-")
        rows.append({"transfer": transfer, "regime": regime, **_of_source(work, transfer, regime)})
        print(rows[-1], flush=True)
    write_json(Path(args.out), rows)


def _of_source(work: Work, transfer: str, regime: str) -> dict:
    """Accuracy on the source's test texts as it is and without each block; the largest k* and column mass of each."""
    model = work.source_model(transfer, regime)
    train, test = work.texts(transfer).source_parts
    loop = work.config.train
    parts = np.array_split(np.arange(loop.batch_size * BATCHES), BATCHES)
    probe = [batch_of(train, rows, loop.device) for rows in parts]
    config = MonitorConfig(every=1, quantities=(Rank(sequences=loop.batch_size, every=1),), probe_share=None)
    with Monitor(model.eval(), config, probe=probe, alerts=None) as monitor:
        forward(model, probe[0], loop).loss.backward()
        monitor.step()
    found = {"accuracy": evaluate(model, test, loop)["accuracy"], "n": len(test), "without": []}
    for block in range(monitor.timeline.rank_k90.shape[1]):
        handle = drop(model, [block])
        found["without"].append(evaluate(model, test, loop)["accuracy"])
        handle.remove()
    for name, of_heads in (("rank_k90", np.nanmax), ("column_mass", np.nanmean)):
        values = np.nanmean(getattr(monitor.timeline, name), axis=0)  # [L, H]
        found[name] = [round(float(value), 4) for value in of_heads(values, axis=1)]
    return found


if __name__ == "__main__":
    main()
