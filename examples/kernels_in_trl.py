"""TRL: its SDFT trainer under its own name and arguments, from another place.

python examples/kernels_in_trl.py
"""

import tempfile

from datasets import Dataset
from trl.experimental.sdft import SDFTConfig

# from trl.experimental.sdft import SDFTTrainer
from selfdistill_kernels.integrations.trl.self_distillation import SDFTTrainer

data = Dataset.from_dict(
    {
        "prompt": [f"<user> {number} + 8 + 5 mod 100 <assistant>" for number in range(40, 48)],
        "privileged_context": [
            f"<reference> now {number} plus 8 makes {number + 8} </reference>"
            for number in range(40, 48)
        ],
    }
)
with tempfile.TemporaryDirectory() as folder:
    arguments = SDFTConfig(
        folder, max_steps=3, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=16, distillation_mode="full_logits", distillation_alpha=0.0,
        teacher_model_kind="live", logging_steps=1, report_to="none", save_strategy="no",
        bf16=False,
    )  # fmt: skip
    trainer = SDFTTrainer("examples/arithmetic/solver", args=arguments, train_dataset=data)
    trainer.train()
