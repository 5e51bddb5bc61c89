from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from selfdistill.config import TransformersTextEngine
from selfdistill.critic.textgen.build import build_text_generator


def test_a_frozen_model_answers_greedily(
    solver_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = TransformersTextEngine(
        model=str(solver_dir), dtype="float32", max_new_tokens=8, batch_size=2
    )
    generator = build_text_generator(config, device="cpu")
    prompts = ["4 + 7", "3 - 1 mod 100", "9"]
    answers = dict(generator.generate(prompts))
    assert [place for place, _ in generator.generate(prompts)] == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(solver_dir)
    for place, prompt in enumerate(prompts):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**ids, do_sample=False, max_new_tokens=8)
        expected = output[0, ids["input_ids"].shape[1] :].tolist()
        finished = expected[-1] == tokenizer.eos_token_id
        assert answers[place].text == tokenizer.decode(expected[:-1] if finished else expected)
        assert answers[place].finished == finished
    assert str(solver_dir) in generator.identity
