"""SFT-GO in TRL's SFTTrainer: `python PATH/examples/trl_sft.py MODEL DATA OUT`, also under torchrun.

The loss is that of `hf_trainer.py`. It computes what `--scope micro_batch` does: each micro-batch has its own worst
group, and counts by its share of the step's tokens. The exact step needs the loop of train.py.
"""

import sys

import torch
from datasets import Dataset
from hf_trainer import SFTGO as OfTransformers
from labelled import collate, samples
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class SFTGO(SFTTrainer):
    lam, compute_loss = OfTransformers.lam, OfTransformers.compute_loss


def trainer(folder: str, path: str, **settings) -> SFTGO:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = Dataset.from_list(samples(path, folder, model.config.vocab_size))
    ready = {"skip_prepare_dataset": True}  # tokenized, with groups: there is nothing for TRL to do
    args = SFTConfig(remove_unused_columns=False, dataset_kwargs=ready, bf16=torch.cuda.is_available(), **settings)
    return SFTGO(model, args, collate, rows, processing_class=tokenizer)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, path, out = sys.argv[1:]
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=40)
    trainer(folder, path, output_dir=out, **settings).train()
