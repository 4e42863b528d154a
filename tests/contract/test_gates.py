"""The promises of DESIGN 3.6, kept by every architecture on its tiny preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.evaluation.answer import answer_all
from components.training.history import read_metrics
from components.training.loop import Alone, StageLoop, train_stage
from components.training.objective import objective_of
from models.batch import Batch, Layout, Pair, collate
from models.recipe import Optimiser, Stage
from models.rendering import IGNORED
from tests.contract.conftest import ROWS, Subject

TOLERANCE = 2e-5  # of a summed loss, relative, in float32


ASR = Stage(name="recognition", train=("connector",))


def batch_of(subject: Subject, pairs: list[Pair], layout: Layout = "right") -> Batch:
    return collate(pairs, subject.tokenizer.pad_token_id, layout)


def loss_and_gradient(subject: Subject, batches: list[Batch], train: tuple[str, ...]) -> tuple[float, Tensor]:
    subject.model.freeze(train)
    subject.model.zero_grad(set_to_none=True)
    total = sum(subject.model(batch)[0] for batch in batches)
    total.backward()
    learning = [p for p in subject.model.parameters() if p.requires_grad]
    return float(total.detach()), torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in learning]
    )


def test_placeholders_match_what_the_connector_makes(subject: Subject) -> None:
    """Or are the most that it can make, where that depends on what is said."""
    model = subject.model
    for stage in subject.preset.recipe.stages:
        for rendered, clips in subject.rendered(stage):
            assert len(rendered.ids) == len(rendered.labels)
            assert len(rendered.audio_at) == sum(rendered.clip_tokens)
            for clip, tokens in zip(clips, rendered.clip_tokens, strict=False):
                assert tokens == (model.audio_tokens(clip.frames) if model.spliced else 0)
            if rendered.clip_at:
                batch = batch_of(subject, [(rendered, clips)])
                _, counts = model.connect(*model.sound(batch))
                assert len(counts) == len(batch.clip_tokens)
                if model.spliced and model.exact_tokens:
                    assert torch.equal(counts, batch.clip_tokens)
                elif model.spliced:
                    assert bool((counts <= batch.clip_tokens).all())


def test_encoder_lengths_are_known_without_running(subject: Subject) -> None:
    for role, audio in ((r, a) for a in subject.audios.values() for r in a.features):
        encoder = subject.model.encoder(role)
        sample = next(
            w for key, w in zip(subject.audios, subject.waveforms, strict=True) if subject.audios[key] is audio
        )
        assert len(audio.features[role]) == encoder.output_length(len(sample))


def test_prompt_is_a_prefix_of_the_training_sequence(subject: Subject) -> None:
    for sample in subject.samples({"asr": 1.0}):
        clips = [subject.audios[key] for key in sample.keys]
        whole = subject.model.render(subject.tokenizer, list(sample.messages), clips)
        prompt = subject.model.render(subject.tokenizer, sample.prompt(), clips)
        assert whole.ids[: len(prompt)] == prompt.ids
        answer = [label for label in whole.labels[len(prompt) :] if label != IGNORED]
        assert subject.tokenizer.decode(answer, skip_special_tokens=True).strip().startswith(sample.reference)
        assert answer[-1] in subject.model.end_tokens(subject.tokenizer)


def test_no_loss_on_prompt_audio_or_padding(subject: Subject) -> None:
    """Except where the paper trains on it (SpeechGPT masks its prefix only), which `loss_on_prompt` declares."""
    pairs = subject.rendered(ASR)
    for (rendered, _), sample in zip(pairs, subject.samples({"asr": 1.0}), strict=True):
        prompt = len(subject.model.render(subject.tokenizer, sample.prompt(), [subject.audios[sample.key]]))
        on_prompt = sum(label != IGNORED for label in rendered.labels[:prompt])
        assert (on_prompt > 0) == subject.architecture.loss_on_prompt
        assert all(rendered.labels[at] == IGNORED for at in rendered.audio_at)
    layouts: tuple[Layout, ...] = ("right", "left")
    for layout in layouts:
        batch = batch_of(subject, pairs, layout)
        assert bool((batch.labels[batch.segments == 0] == IGNORED).all())
        assert batch.label_tokens == sum(
            sum(label != IGNORED for label in rendered.labels[1:]) for rendered, _ in pairs
        )


def test_alone_padded_left_right_and_packed_agree(subject: Subject) -> None:
    stage = subject.preset.recipe.stages[-1].model_copy(update={"tasks": {"asr": 1.0}, "shots": 0})
    pairs = subject.rendered(stage)
    if subject.preset.recipe.hears[-1]:
        heard = subject.heard()
        pairs = [(rendered, [heard[row["key"]]]) for (rendered, _), row in zip(pairs, ROWS, strict=True)]
    alone, gradient = loss_and_gradient(subject, [batch_of(subject, [pair]) for pair in pairs], stage.train)
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    for layout in layouts:
        loss, other = loss_and_gradient(subject, [batch_of(subject, pairs, layout)], stage.train)
        assert loss == pytest.approx(alone, rel=TOLERANCE), layout
        assert torch.allclose(other, gradient, atol=1e-3 * float(gradient.abs().max())), layout


def test_the_dense_mask_of_packed_rows_agrees_with_their_borders(subject: Subject) -> None:
    """The fallback for backbones that cannot be told where samples end."""
    if subject.model.llm.config.is_encoder_decoder:
        return  # its samples are rows of their own
    batch = batch_of(subject, subject.rendered(ASR), "packed")
    borders = subject.model.hidden(batch)
    config = subject.model.llm.config
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        assert torch.allclose(subject.model.hidden(batch), borders, atol=1e-5)
    finally:
        config._attn_implementation = before


def test_packed_samples_do_not_see_each_other(subject: Subject) -> None:
    """Changing the first sample of a packed row leaves the hidden states of the second as they were."""
    pairs = subject.rendered(ASR)
    before, packed = subject.model.run(batch_of(subject, pairs, "packed"))
    other = subject.rendered(Stage(name="captions", train=("connector",), tasks={"caption": 1.0}))
    changed = [other[0], *pairs[1:]] if other else pairs[1:]
    after = subject.model.hidden(batch_of(subject, changed, "packed"))
    tail = int((packed.segments > 1).sum())
    assert torch.allclose(before[0, -tail:], after[0, -tail:], atol=1e-5)


def test_cached_equals_live(subject: Subject, tmp_path: Path) -> None:
    """What a cache would hold (bfloat16 features, or units) gives the model the tokens that listening gives it."""
    again = subject.model.listen(subject.waveforms[::-1])[::-1]
    for live, first in zip(again, subject.audios.values(), strict=True):
        if live.units is not None and first.units is not None:
            assert torch.equal(live.units, first.units)
        for role, frames in live.features.items():
            assert torch.allclose(frames, first.features[role], atol=1e-2, rtol=1e-2)


def test_freeze_plan_is_what_receives_a_gradient(subject: Subject) -> None:
    for stage in subject.preset.recipe.stages:
        named = subject.model.freeze(stage.train)
        subject.model.zero_grad(set_to_none=True)
        pairs = subject.rendered(stage)
        assert pairs, f"the test rows give stage {stage.name} nothing to learn from"
        objective = objective_of(stage, subject.data(stage), subject.tokenizer)
        subject.model(batch_of(subject, pairs), objective)[0].backward()
        received = [name for name, p in subject.model.named_parameters() if p.grad is not None]
        assert received == named
        assert named == [name for name, p in subject.model.named_parameters() if p.requires_grad]


def test_unknown_group_is_refused_by_name(subject: Subject) -> None:
    with pytest.raises(ValueError, match="no parameters in group 'conector'"):
        subject.model.freeze(("conector",))


def test_save_and_load_give_the_same_logits(subject: Subject, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    subject.model.save_pretrained(tmp_path)
    loaded = subject.architecture.from_pretrained(tmp_path)
    batch = batch_of(subject, subject.rendered(ASR))
    assert torch.equal(loaded.hidden(batch), subject.model.hidden(batch))
    for one, other in zip(loaded.listen(subject.waveforms), subject.model.listen(subject.waveforms), strict=True):
        assert one.units is None or torch.equal(one.units, other.units)
        assert all(torch.equal(one.features[role], other.features[role]) for role in one.features)


@pytest.mark.slow
def test_a_folder_that_does_not_fit_is_refused(subject: Subject, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    subject.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if name.startswith(("connector", "llm")))
    state.pop(lost)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=f"missing .*{lost}"):
        subject.architecture.from_pretrained(tmp_path)


@pytest.mark.slow
def test_one_batch_can_be_overfitted(subject: Subject, tmp_path: Path) -> None:
    """Sixty steps on one clip bring the loss of the answer to less than a third."""
    groups = tuple(g for g in ("connector", "lora", "llm") if subject.model.parameter_groups()[g])
    stage = Stage(
        name="overfit", train=groups, optimiser=Optimiser(lr=1e-2, schedule="constant"), epochs=60, batch_tokens=512
    )
    data = subject.data(stage, rows=ROWS[:1])
    loop = StageLoop(stage, data, subject.model, subject.tokenizer, str(tmp_path), 0, Alone())
    train_stage(loop, [])
    losses = [line["loss"] for line in read_metrics(str(tmp_path))]
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 3


@pytest.mark.slow
def test_every_stage_of_the_recipe_runs_and_starts_from_the_one_before(subject: Subject, tmp_path: Path) -> None:
    trained: list[str] = []
    for number, stage in enumerate(subject.preset.recipe.stages):
        before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
        data = subject.data(stage, number)
        assert len(data.plan) > 0, f"stage {stage.name} has nothing to learn from"
        loop = StageLoop(stage, data, subject.model, subject.tokenizer, str(tmp_path / stage.name), number, Alone())
        trained = train_stage(loop, trained)
        changed = {name for name, p in subject.model.named_parameters() if not torch.equal(before[name], p)}
        assert changed
        assert changed <= set(subject.model.freeze(stage.train))
        assert set(trained) >= changed


def test_answers_do_not_depend_on_the_batch(subject: Subject) -> None:
    prompts = [sample.prompt() for sample in subject.samples({"asr": 1.0})]
    audios, seconds = [[audio] for audio in subject.audios.values()], [row["seconds"] for row in ROWS]
    decoding = subject.preset.recipe.decoding.model_copy(update={"sample": False, "beams": 1, "max_new_tokens": 6})
    together = answer_all(subject.model, subject.tokenizer, prompts, audios, seconds, decoding)
    alone = [
        answer_all(subject.model, subject.tokenizer, [p], [a], [s], decoding)[0]
        for p, a, s in zip(prompts, audios, seconds, strict=True)
    ]
    assert together == alone


def test_all_presets_are_complete(subject: Subject) -> None:
    for name in ("paper", "small", "tiny"):
        preset = subject.architecture.preset(name)  # type: ignore[arg-type]
        assert preset.recipe.stages
        assert [s.name for s in preset.recipe.stages] == [s.name for s in subject.preset.recipe.stages], (
            "the recipe keeps the paper's order"
        )
        assert type(preset).model_validate(preset.model_dump(mode="json")) == preset


@pytest.mark.slow
def test_paper_groups_exist_on_the_meta_device(subject: Subject) -> None:
    preset = subject.architecture.preset("paper")
    model = subject.architecture.on_meta(preset)
    assert all(p.device.type == "meta" for p in model.parameters())
    for stage in preset.recipe.stages:
        assert model.freeze(stage.train)


def test_text_alone_needs_no_audio(subject: Subject) -> None:
    """A rendered sample without placeholders gives a batch without features."""
    pairs = [(rendered, clips) for rendered, clips in subject.rendered(ASR) if not rendered.clip_at]
    for pair in pairs:
        assert batch_of(subject, [pair]).features == {}


def test_lora_scaled_to_zero_is_the_backbone(subject: Subject) -> None:
    if subject.preset.lora is None:
        return
    batch = batch_of(subject, subject.rendered(ASR))
    before = subject.model.hidden(batch)
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert not torch.allclose(subject.model.hidden(batch), before, atol=1e-4)
    subject.model.scale_lora(0.0)
    assert torch.allclose(subject.model.hidden(batch), before, atol=1e-6)
