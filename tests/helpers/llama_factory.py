"""What LLaMA-Factory 0.9.6 does around a training, from its source: `python -m helpers.llama_factory train A.yaml`.

Its launcher takes the command from the arguments and, for several processes, starts torchrun on itself with the
environment that it has; `run_exp` reads the file, adds callbacks of its own to those it is given, and trains with a
subclass of Seq2SeqTrainer. The file here holds training arguments.
"""

import os
import subprocess
import sys
from copy import deepcopy

import yaml


def trainer_class():
    """Imported where a process trains: the launcher only starts it."""
    from transformers import Seq2SeqTrainer

    class CustomSeq2SeqTrainer(Seq2SeqTrainer):
        def __init__(self, finetuning_args, **kwargs):
            super().__init__(**kwargs)
            self.finetuning_args = finetuning_args

        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    return CustomSeq2SeqTrainer


def run_exp(args=None, callbacks=None):
    from transformers import Seq2SeqTrainingArguments, TrainerCallback

    from helpers import trainers

    if args is None:
        with open(sys.argv[1]) as file:
            args = yaml.safe_load(file)
    callbacks = callbacks or []
    callbacks.append(TrainerCallback())
    trainer = trainer_class()(
        finetuning_args=None,
        model=trainers.classifier(),
        args=Seq2SeqTrainingArguments(**args),
        train_dataset=trainers.items(),
        callbacks=callbacks,
    )
    trainer.train()


def launch():
    command = sys.argv.pop(1)
    if command == "train" and os.environ.get("FORCE_TORCHRUN") == "1":
        words = (
            "torchrun --nnodes 1 --node_rank 0 --nproc_per_node {nproc} --master_addr 127.0.0.1 --master_port {port} "
        )
        words += "{file_name} {args}"
        words = words.format(
            nproc=os.environ["NPROC_PER_NODE"],
            port=os.environ["MASTER_PORT"],
            file_name=__file__,
            args=" ".join(sys.argv[1:]),
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", *words.split()[1:]]
        sys.exit(subprocess.run(torchrun, env=deepcopy(os.environ), check=True).returncode)
    run_exp()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        launch()
    else:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        run_exp()
