"""SFT-GO in transformers' Trainer: `python PATH/examples/hf_trainer.py MODEL DATA OUT`, also under torchrun.

It computes what `--scope micro_batch` does: each micro-batch has its own worst group, and counts by its share of the
step's tokens. The exact step, whose groups span all micro-batches and processes, needs the loop of train.py.
"""

import sys

from labelled import collate, samples
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sftgo import sft_go_loss


class SFTGO(Trainer):
    lam = 0.9

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, out = inputs["labels"][:, 1:], model(input_ids=inputs["input_ids"])
        nll = cross_entropy(out.logits[:, :-1].float().mT, labels, reduction="none")  # (B, T - 1)
        loss, _ = sft_go_loss(nll, inputs["important"][:, 1:], labels != -100, self.lam)
        if model.training:  # num_items_in_batch: the step's tokens, over all processes
            if num_items_in_batch is None or not self.args.average_tokens_across_devices:
                raise ValueError("needs average_tokens_across_devices, and a model that takes loss arguments")
            share = (labels != -100).sum() / num_items_in_batch
            loss = loss * share * self.accelerator.num_processes  # Trainer adds micro-batches, and averages processes
        return (loss, out) if return_outputs else loss


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, path, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    args = TrainingArguments(out, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=40)
    args.remove_unused_columns = False  # `important` is not an argument of the model
    SFTGO(model, args, collate, samples(path, folder, model.config.vocab_size)).train()
