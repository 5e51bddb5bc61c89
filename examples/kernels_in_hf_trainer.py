"""transformers.Trainer: another class, a teacher, and an objective.

python examples/kernels_in_hf_trainer.py
"""

import tempfile

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from selfdistill_kernels import Objective
from selfdistill_kernels.integrations.transformers import FusedLossTrainer

FOLDER = "examples/arithmetic/solver"
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
student = AutoModelForCausalLM.from_pretrained(FOLDER)
teacher = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
text = "<user> {} + 8 + 5 mod 100 <assistant> <step_1> now {} plus 8 makes 55 <answer> 60"
data = [tokenizer(text.format(number, number)) for number in range(10, 26)]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=1, report_to="none", save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = FusedLossTrainer(
        student, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), data,
        teacher=teacher, objective=Objective("forward_kl", cross_entropy=0.5),
    )  # fmt: skip
    trainer.train()
