"""ParaUni: the two-part VLM pass against one whole pass, which layers are read,
what is trained, saved, loaded and refused."""
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common import derive_seed, generator, read_safetensors, save_safetensors
from dit import DiT, DiTConfig
from helpers import save_parts
from lim import LIM, LIMConfig
from model import (IMAGENET_MEAN, IMAGENET_STD, PRESETS, PROMPT, QUESTION, UNCONDITIONAL, ParaUni, VLMConfig,
                   build_vlm, save_trained)

NANO = PRESETS["nano"]
L, N, D = NANO.vlm.num_layers, NANO.num_queries, NANO.vlm.width
PROMPTS = ["a heart", "a picture of a red heart left of a blue star", None, "two moons"]


@dataclass(frozen=True)
class Config:
    preset: str = "nano"
    lr: float = 1e-4


def awake(model: ParaUni) -> ParaUni:
    """Fresh weights hardly tell prompts apart, and a fresh DiT answers 0:
    make both depend on what they read."""
    rng = generator(0, "awake")
    with torch.no_grad():
        for p in model.vlm.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
        for p in (*model.lim.agglayer_norm.parameters(), model.dit.proj_out.weight,
                  model.dit.scale_shift_table):
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
        for block in model.dit.transformer_blocks:
            block.scale_shift_table.add_(0.5 * torch.randn(block.scale_shift_table.shape, generator=rng))
    return model


@pytest.fixture(scope="module")
def model() -> ParaUni:
    """Shared by all tests, which leave it as it is."""
    return awake(ParaUni.from_preset("nano", "random"))


@pytest.fixture(scope="module")
def folder(model: ParaUni, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parts(model, tmp_path_factory.mktemp("parts"))


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to damage."""
    return shutil.copytree(folder, tmp_path / "broken")


def pictures(B: int, seed: int = 0) -> Tensor:
    return torch.rand(B, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def spell(prompt: str | None, image: bool = False) -> str:
    """The published strings, written out by hand."""
    shown = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>\n" if image else ""
    said = "Generate an image." if prompt is None else f"Generate an image: {prompt}"
    return f"<|im_start|>user\n{shown}{said}<|im_end|>\n<|im_start|>assistant\n<img>"


def one_pass(model: ParaUni, prompts: list[str | None],
             images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features of the queries (L, B, N, D), and their inputs, from prompt and queries in one sequence with
    gradient; each prompt alone, so that nothing is padded or masked."""
    language, rows = model.vlm.model.language_model, []
    leaf = model.queries.detach().clone().requires_grad_()
    for b, prompt in enumerate(prompts):
        ids = torch.tensor([model.tokenizer(spell(prompt, images is not None),
                                            add_special_tokens=False).input_ids])
        embeds = model.vlm.get_input_embeddings()(ids)                                  # (1, S, D)
        if images is not None:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            tokens = model.vlm.model.get_image_features(
                pixel_values=(images[b:b + 1] - mean) / std).pooler_output
            embeds[ids == 5] = tokens.reshape(16, D)
        whole = torch.cat([embeds, leaf[None]], 1)                                      # (1, S + N, D)
        out = language(inputs_embeds=whole, use_cache=False, output_hidden_states=True)
        rows.append(torch.stack(out.hidden_states[1:])[:, :, -N:])                      # (L, 1, N, D)
    return torch.cat(rows, 1), leaf


# ----------------------------------------------------------------------------- prompt -> condition

@pytest.mark.parametrize("with_images", [False, True])
def test_prefix_and_queries_equal_one_pass_in_value_and_gradient(model: ParaUni, with_images: bool) -> None:
    images = pictures(len(PROMPTS)) if with_images else None
    got = model.read_queries(model.encode_prefix(PROMPTS, images))
    want, leaf = one_pass(model, PROMPTS, images)
    assert got.shape == (L, len(PROMPTS), N, D)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    gradient, = torch.autograd.grad((got * weight).sum(), model.queries)
    reference, = torch.autograd.grad((want * weight).sum(), leaf)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert (got[:, 0] - got[:, 1]).abs().max() > 0.1             # the prompts are heard at all


def test_padded_batch_equals_one_padded_pass(model: ParaUni) -> None:
    """The same, on one padded sequence with mask and positions,
    as training by the whole sequence would do it."""
    ids, mask = model.tokenize([spell(p) for p in PROMPTS])
    B = len(PROMPTS)
    mask = torch.cat([mask, mask.new_ones(B, N)], 1)
    whole = torch.cat([model.vlm.get_input_embeddings()(ids), model.queries.expand(B, -1, -1)], 1)
    out = model.vlm.model.language_model(inputs_embeds=whole, attention_mask=mask,
                                         position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                                         use_cache=False, output_hidden_states=True)
    want = torch.stack(out.hidden_states[1:])[:, :, -N:]
    torch.testing.assert_close(model.read_queries(model.encode_prefix(PROMPTS)), want, rtol=1e-4, atol=1e-4)


def test_prefix_has_no_graph_and_can_be_read_again(model: ParaUni) -> None:
    prefix = model.encode_prefix(PROMPTS)
    before = [(k.clone(), v.clone()) for k, v in prefix.keys_values]
    first = model.read_queries(prefix)
    first.sum().backward()
    model.queries.grad = None
    assert torch.equal(first, model.read_queries(prefix))
    assert len(prefix.keys_values) == L
    for (k, v), (k0, v0) in zip(prefix.keys_values, before, strict=True):
        assert not k.requires_grad and torch.equal(k, k0) and torch.equal(v, v0)


def test_batch_of_as_many_prompts_as_layers_is_not_mixed(model: ParaUni) -> None:
    prompts = ["a heart", "a red star", "two moons", "a ring above a square", None,
               "a photo of a blue circle", "four triangles", "a moon"]
    assert len(prompts) == L
    with torch.no_grad():
        together = model.condition(prompts)
        alone = torch.cat([model.condition([p]) for p in prompts])
        per_layer = model.condition_layers(model.encode_prefix(prompts))
    assert together.shape == (L, N, NANO.lim.caption_channels) and per_layer.shape[:2] == (L, L)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, per_layer.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.pdist(together.flatten(1)).min() > 0.1


def test_condition_does_not_depend_on_the_batch(model: ParaUni) -> None:
    images = pictures(3)
    with torch.no_grad():
        alone = model.condition(["a red heart"], images[:1])
        among = model.condition(["a red heart", "a picture of a red heart left of a blue star", "a moon"],
                                images)
        back = model.condition(["a moon", "a picture of a red heart left of a blue star", "a red heart"],
                               images.flip(0))
    torch.testing.assert_close(among[:1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.flip(0), among, rtol=1e-5, atol=1e-5)


def test_layers_are_the_outputs_of_the_vlm_layers_counted_from_one(model: ParaUni) -> None:
    language, raw = model.vlm.model.language_model, []
    hooks = [layer.register_forward_hook(lambda *call: raw.append(call[-1])) for layer in language.layers]
    features, _ = one_pass(model, ["a red heart"])
    for hook in hooks:
        hook.remove()
    raw = [hidden[:, -N:] for hidden in raw]
    torch.testing.assert_close(features[:-1], torch.stack(raw[:-1]), rtol=0, atol=1e-6)
    # the last has the final norm on it
    torch.testing.assert_close(features[-1], language.norm(raw[-1]), rtol=0, atol=1e-5)
    c = [model.lim.agglayer_norm(model.lim.projector(model.lim.connector(q))) for q in features]
    for layers in ([1], [3], [L], [2, 5, 8], list(range(1, L + 1))):
        want = torch.stack([c[i - 1] for i in layers]).mean(0)
        torch.testing.assert_close(model.condition(["a red heart"], layers=layers), want,
                                   rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.condition(["a red heart"]), torch.stack(c).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [[0], [L + 1], [], [2, 2]])
def test_layers_out_of_range_are_refused(model: ParaUni, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=f"layers must name at least one of 1..{L}"):
        model.condition(["a heart"], layers=layers)


def test_kept_fields_and_noise_multiply_each_layer(model: ParaUni) -> None:
    rng = torch.Generator().manual_seed(0)
    c = torch.randn(L, 3, N, 5, generator=rng)
    factor, noise = torch.randn(L, N, 5, generator=rng), torch.randn(L, 3, N, 5, generator=rng)
    other = ParaUni.from_preset("nano", "random")
    torch.testing.assert_close(other.fuse(c), c.mean(0))
    torch.testing.assert_close(other.fuse(c, noise=noise), (c * (1 + noise)).mean(0))
    other.layer_factor = factor
    torch.testing.assert_close(other.fuse(c), (c * factor[:, None]).mean(0))
    torch.testing.assert_close(other.fuse(c, [2, 4], noise),
                               (c * factor[:, None] * (1 + noise))[[1, 3]].mean(0))
    assert "layer_factor" not in other.state_dict() and other.double().layer_factor.dtype == torch.float64


def test_embedding_of_pictures_is_the_vlms_own(model: ParaUni) -> None:
    """Image features where transformers puts them itself, from pictures of any size."""
    ids, mask = model.tokenize([spell("a heart", True), spell("a picture of a red star", True)])
    large = torch.nn.functional.interpolate(pictures(2), scale_factor=2, mode="nearest")
    pixels = model.pixels(large)
    assert pixels.shape == (2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(pixels, (pictures(2) - mean) / std, rtol=0, atol=1e-5)
    own = model.vlm.model(input_ids=ids, attention_mask=mask, pixel_values=pixels,
                          output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(model.embed(ids, large), own, rtol=0, atol=1e-5)
    assert not torch.equal(model.condition(["a heart"], pictures(1)),
                           model.condition(["a heart"], pictures(1, seed=1)))


# ----------------------------------------------------------------------------- words

def test_templates_are_the_published_ones() -> None:
    assert PROMPT.format(image="", caption="a cat") == \
        "<|im_start|>user\nGenerate an image: a cat<|im_end|>\n<|im_start|>assistant\n<img>"
    assert UNCONDITIONAL.format(image="") == (
        "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n<img>")
    assert QUESTION.format(image="", question="why?") == (
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_reach_the_vlm_as_those_templates(model: ParaUni, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tokenize = [], model.tokenize
    monkeypatch.setattr(model, "tokenize",
                        lambda texts, limit=None: seen.extend(texts) or tokenize(texts, limit))
    model.encode_prefix(["  a heart\n", None])
    model.encode_prefix(["a heart", None], pictures(2))
    assert seen == [spell("a heart"), spell(None), spell("a heart", True), spell(None, True)]
    ids, _ = tokenize([spell("a heart"), spell(None)])
    frame = ["<|im_start|>", "user", "\n", "generate", "an", "image"]
    tail = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", "<img>"]
    assert model.tokenizer.convert_ids_to_tokens(ids[0]) == [*frame, ":", "a", "heart", *tail]
    assert model.tokenizer.convert_ids_to_tokens(ids[1])[:13] == [*frame, ".", *tail]


def test_tokenize_pads_right_and_keeps_the_first_tokens(model: ParaUni) -> None:
    ids, mask = model.tokenize(["a red heart", "a"])
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]] and ids[1, 0] == ids[0, 0] and ids.dtype == torch.long
    cut, cut_mask = model.tokenize(["a red heart", "a"], max_tokens=2)
    assert torch.equal(cut, ids[:, :2]) and torch.equal(cut_mask, mask[:, :2])
    long = "a red heart and a blue star"
    assert len(model.encode_prefix([long], max_tokens=8).mask[0]) == 8
    torch.testing.assert_close(model.encode_prefix([long], max_tokens=8).keys_values[-1][0],
                               model.encode_prefix([long]).keys_values[-1][0][:, :, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompts, sentence", [
    (["a heart", "a purple Giraffe, with hats"],
     "words of this model do not include 'Giraffe', 'hats'; expected a prompt such as"),
    (["a heart", " \n"], "expected every prompt to say something, got an empty one"),
    ([""], "expected every prompt to say something"),
    ([], "expected at least one prompt, got an empty list"),
    (["a heart and " * 80], "expected a prompt of at most 240 tokens, got 253")])
def test_prompts_that_cannot_be_read_are_refused(model: ParaUni, prompts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        model.condition(prompts)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=sentence):
        model.generate(prompts, num_steps=1)


def test_one_picture_for_each_prompt(model: ParaUni) -> None:
    for B in (1, 3):
        with pytest.raises(ValueError,
                           match=f"expected one picture for each prompt, got {B} pictures and 2 prompts"):
            model.condition(["a heart", "a star"], pictures(B))


# ----------------------------------------------------------------------------- pictures and answers

def test_pictures_depend_on_seed_and_place_and_not_on_the_batch(model: ParaUni) -> None:
    prompts = ["a heart", "a blue star", "two moons"]
    images = model.generate(prompts, num_steps=3, seed=7)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.02
    assert torch.equal(images, model.generate(prompts, num_steps=3, seed=7))
    torch.testing.assert_close(model.generate(prompts[:2], num_steps=3, seed=7), images[:2],
                               rtol=0, atol=1e-4)
    alone = model.generate([prompts[2]], num_steps=3, seed=[derive_seed(7, "picture", 2)])
    torch.testing.assert_close(alone, images[2:], rtol=0, atol=1e-4)
    assert (model.generate(prompts, num_steps=3, seed=8) - images).abs().amax((1, 2, 3)).min() > 0.05
    same = model.generate([prompts[0]] * 2, num_steps=3, seed=[1, 1])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)


def test_prompt_image_layers_and_guidance_are_heard(model: ParaUni) -> None:
    def draw(prompt: str = "a heart", guidance_scale: float = 4.5,
             **more: Tensor | list[int] | str) -> Tensor:
        return model.generate([prompt], 3, guidance_scale, seed=[5], **more)
    base = draw()
    for other in (draw("a blue star"), draw(guidance_scale=2.0), draw(images=pictures(1)), draw(layers=[2]),
                  draw(solver="euler")):
        assert (other - base).abs().max() > 1e-3


def test_guidance_is_against_the_unconditional_prompt(model: ParaUni,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    seen, condition = [], model.condition
    monkeypatch.setattr(model, "condition",
                        lambda prompts, *more: seen.append(prompts) or condition(prompts, *more))
    model.generate(["a heart", "a star"], num_steps=1)
    assert seen == [["a heart", "a star"], [None]]


def test_generate_refuses_a_list_of_too_few_seeds(model: ParaUni) -> None:
    with pytest.raises(ValueError, match="expected one generator for each of 2 rows, got 1"):
        model.generate(["a heart", "a star"], num_steps=1, seed=[1])


def test_decode_maps_to_pictures_whatever_the_chunk(model: ParaUni) -> None:
    latents = torch.randn(3, *NANO.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = (model.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    for chunk in (1, 2, 64):
        torch.testing.assert_close(model.decode(latents, chunk), want, rtol=0, atol=1e-5)


def test_answers_are_greedy_and_do_not_depend_on_the_batch(model: ParaUni) -> None:
    images = pictures(3)
    asked = ["how many hearts?", "is the red star left of the blue moon?", "what color is the ring?"]
    answers = model.answer(images, asked, max_new_tokens=5)
    assert all(isinstance(a, str) for a in answers) and len(set(answers)) > 1
    assert answers == [model.answer(images[i:i + 1], asked[i:i + 1], max_new_tokens=5)[0] for i in range(3)]
    for i, question in enumerate(asked):
        shown = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>\n"
        row = model.tokenizer(QUESTION.format(image=shown, question=question),
                              add_special_tokens=False).input_ids
        assert row.count(5) == 16
        start = len(row)
        with torch.no_grad():
            for _ in range(5):
                logits = model.vlm(input_ids=torch.tensor([row]),
                                   pixel_values=model.pixels(images[i:i + 1])).logits
                logits[0, -1, 5] = -torch.inf                   # no answer is a picture token
                row.append(int(logits[0, -1].argmax()))
                if row[-1] == model.tokenizer.convert_tokens_to_ids("<|im_end|>"):
                    break
        assert model.tokenizer.decode(row[start:], skip_special_tokens=True).strip() == answers[i]


def test_chat_is_one_answer(model: ParaUni) -> None:
    image = pictures(1)[0]
    assert model.chat(image, "how many hearts?") == model.answer(image[None], ["how many hearts?"])[0]
    with pytest.raises(ValueError, match="expected a question, got an empty one"):
        model.chat(image, " ")


# ----------------------------------------------------------------------------- what is trained

def test_train_leaves_the_frozen_parts_in_eval(model: ParaUni) -> None:
    try:
        assert model.train() is model and model.dit.training and model.lim.training
        assert not any(m.training for part in (model.vlm, model.vae) for m in part.modules())
    finally:
        model.eval()
    assert not model.training and not model.dit.training
    assert not any(p.requires_grad for part in (model.vlm, model.vae) for p in part.parameters())


def test_trainable_parameters_of_each_stage(model: ParaUni) -> None:
    lim, dit = ({f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()}
                for part in ("lim", "dit"))
    assert set(model.trainable(1)) == {"queries"} | lim
    assert set(model.trainable(2)) == set(model.trainable(3)) == {"queries"} | lim | dit
    own = dict(model.named_parameters())
    assert all(own[name] is p and p.requires_grad for name, p in model.trainable(3).items())
    assert {name for name, p in own.items() if p.requires_grad} == set(model.trainable(3))


def test_queries_start_small_and_random_weights_follow_the_seed() -> None:
    state = torch.get_rng_state()
    first, again, other = (ParaUni.from_preset("nano", "random", seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert not first.training and abs(first.queries.std().item() * D ** 0.5 - 1) < 0.1
    a, b, c = (m.state_dict() for m in (first, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("queries", "lim.projector.weight", "dit.patch_embed.proj.weight", "vlm.lm_head.weight",
                 "vae.encoder.conv_in.weight"):
        assert not torch.equal(a[name], c[name]), name


# ----------------------------------------------------------------------------- saving and loading

@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kept", [False, True])
def test_trained_weights_come_back_bit_for_bit(model: ParaUni, tmp_path: Path, stage: int,
                                               kept: bool) -> None:
    source, target = model, ParaUni.from_preset("nano", "random", seed=9)
    fresh = {name: p.clone() for name, p in target.state_dict().items()}
    factor = torch.randn(L, N, 128, generator=torch.Generator().manual_seed(0))
    source.layer_factor, target.layer_factor = (factor, None) if kept else (None, factor)
    path = tmp_path / "trained.safetensors"
    try:
        save_trained(source, path, stage, Config())
    finally:
        source.layer_factor = None
    metadata = target.load_trained(path, stage, "nano")
    assert metadata["stage"] == str(stage)
    assert json.loads(metadata["config"]) == {"preset": "nano", "lr": 1e-4}
    trained = source.trainable(stage)
    assert set(read_safetensors(path)[0]) == set(trained) | ({"ldam.layer_factor"} if kept else set())
    assert all(torch.equal(trained[name], p) for name, p in target.trainable(stage).items())
    assert all(torch.equal(fresh[name], p) for name, p in target.state_dict().items() if name not in trained)
    assert torch.equal(target.layer_factor, factor) if kept else target.layer_factor is None


def test_weights_saved_in_bf16_are_the_rounded_ones(model: ParaUni, tmp_path: Path) -> None:
    save_trained(model, tmp_path / "a.safetensors", 1, Config(), torch.bfloat16)
    target = ParaUni.from_preset("nano", "random", seed=9)
    target.load_trained(tmp_path / "a.safetensors")
    assert target.queries.dtype == torch.float32
    assert torch.equal(target.queries, model.queries.bfloat16().float())


def edit(path: Path, change: Callable[[dict[str, Tensor]], object],
         metadata: dict[str, str] | None = None) -> None:
    """Rewrite a safetensors file with other tensors, or other metadata."""
    tensors, old = read_safetensors(path)
    change(tensors)
    save_safetensors(path, tensors, old | (metadata or {}))


@pytest.mark.parametrize("damage, expected, error, sentence", [
    (lambda path: None, (2, "nano"), ValueError, "to be weights of stage 2, got stage 1; .* --init"),
    (lambda path: None, (1, "l-512"), ValueError, "to be of preset l-512, it is of nano; change --preset"),
    (lambda path: edit(path, lambda t: None, {"stage": "0"}), (None, None), ValueError,
     "stage 1, 2 or 3, got stage 0; .* --init"),
    (lambda path: edit(path, lambda t: t.pop("lim.projector.bias")), (1, "nano"), ValueError,
     "1 missing: lim.projector.bias.*--preset"),
    (lambda path: edit(path, lambda t: t.update(extra=torch.zeros(1))), (1, "nano"), ValueError,
     "1 unknown: extra.*--preset"),
    (lambda path: edit(path, lambda t: t.update(queries=torch.zeros(2, D))), (1, "nano"), ValueError,
     r"queries is \(2, 128\) instead of \(16, 128\).*--preset"),
    (lambda path: edit(path, lambda t: None, {"stage": "2"}), (2, "nano"), ValueError,
     "missing: dit.*--preset"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), (1, "nano"), ValueError, "truncated"),
    (lambda path: path.unlink(), (1, "nano"), FileNotFoundError, "found none; change --init or --weights")])
def test_foreign_and_damaged_files_are_refused(model: ParaUni, tmp_path: Path, damage: Callable,
                                               expected: tuple, error: type, sentence: str) -> None:
    path = tmp_path / "stage1.safetensors"
    save_trained(model, path, 1, Config())
    damage(path)
    target = ParaUni.from_preset("nano", "random", seed=9)
    before = target.queries.clone()
    with pytest.raises(error, match=sentence) as caught:
        target.load_trained(path, *expected)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(before, target.queries) and target.layer_factor is None


def test_file_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"queries": torch.zeros(N, D)})
    with pytest.raises(ValueError, match="x.safetensors to be weights of stage 1, 2 or 3, got stage None"):
        ParaUni.from_preset("nano", "random").load_trained(tmp_path / "x.safetensors")


def test_folder_round_trip_and_the_newest_stage(model: ParaUni, broken: Path) -> None:
    plain = ParaUni.from_preset("nano", broken)
    for part in ("vlm", "dit", "vae"):
        got = getattr(plain, part).state_dict()
        assert all(torch.equal(got[name], p) for name, p in getattr(model, part).state_dict().items())
    assert not plain.training and torch.equal(plain.queries, ParaUni.from_preset("nano", "random").queries)
    save_trained(model, broken / "stage1.safetensors", 1, Config())
    assert torch.equal(ParaUni.from_preset("nano", broken).lim.agglayer_norm.weight,
                       model.lim.agglayer_norm.weight)
    other = ParaUni.from_preset("nano", "random", seed=9)
    save_trained(other, broken / "stage2.safetensors", 2, Config())
    newest = ParaUni.from_preset("nano", str(broken))
    assert all(torch.equal(p, newest.trainable(2)[name]) for name, p in other.trainable(2).items())
    save_trained(other, broken / "stage2.safetensors", 2, Config("l-512"))
    with pytest.raises(ValueError, match="to be of preset nano, it is of l-512"):
        ParaUni.from_preset("nano", broken)


def test_frozen_weights_are_held_in_the_presets_precision(broken: Path) -> None:
    edit(broken / "vlm" / "model.safetensors",
         lambda t: t.update({name: p.bfloat16() for name, p in t.items()}), {"format": "pt"})
    assert ParaUni.from_preset("nano", broken).vlm.dtype == torch.float32
    half = replace(NANO, vlm=replace(NANO.vlm, dtype="bfloat16"))
    assert ParaUni.from_parts(half, broken).vlm.dtype == torch.bfloat16
    assert [PRESETS[name].vlm.dtype for name in PRESETS] == ["float32"] + ["bfloat16"] * 6


def test_presets_without_weights_are_refused() -> None:
    with pytest.raises(ValueError,
                       match="expected --preset to be one of nano, b-512, .*openuni-l-1024, got 'xl'"):
        ParaUni.from_preset("xl")
    for weights in (None, "auto"):
        with pytest.raises(FileNotFoundError, match="expected --weights to name a folder .* preset l-512, "
                                                    "or hub .*Sana_1600M_512px_diffusers"):
            ParaUni.from_preset("l-512", weights)
    with pytest.raises(FileNotFoundError,
                       match="nowhere.vlm.config.json, found none; --weights must name a folder"):
        ParaUni.from_preset("nano", "nowhere")


@pytest.mark.parametrize("missing", ["vlm/config.json", "vlm/tokenizer.json", "vlm/model.safetensors",
                                     "vae/config.json", "transformer/config.json",
                                     "transformer/diffusion_pytorch_model.safetensors",
                                     "vae/diffusion_pytorch_model.safetensors"])
def test_folder_with_a_missing_part_is_refused(broken: Path, missing: str) -> None:
    (broken / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {broken / missing}, found none; .*--weights"):
        ParaUni.from_preset("nano", broken)


@pytest.mark.parametrize("part, key, value",
                         [("transformer", "num_layers", 5), ("vae", "latent_channels", 4)])
def test_folder_of_another_preset_is_refused(broken: Path, part: str, key: str, value: int) -> None:
    path = broken / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{broken / part} is of another preset: expected .* "
                                         "change --preset or --weights"):
        ParaUni.from_preset("nano", broken)


def test_folder_whose_weights_do_not_fit_is_refused(broken: Path) -> None:
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    edit(path, lambda t: t.pop("proj_out.bias"))
    with pytest.raises(ValueError, match=f"{path.parent} does not fit the model .1 missing: proj_out.bias.: "
                                         "change --preset or --weights"):
        ParaUni.from_preset("nano", broken)


@pytest.mark.parametrize("change, sentence", [
    (lambda t: t.pop("language_model.lm_head.weight"), "1 missing: lm_head.weight"),
    (lambda t: t.update(extra=torch.zeros(1)), "1 unknown: extra"),
    (lambda t: t.update({"language_model.lm_head.weight": torch.zeros(95, D)}),
     "1 of another shape: .*lm_head.weight")])
def test_a_vlm_that_does_not_fit_is_refused(broken: Path, change: Callable, sentence: str) -> None:
    edit(broken / "vlm" / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"{broken / 'vlm'} does not fit the model .{sentence}.*: "
                                         "change --preset or --weights"):
        ParaUni.from_parts(NANO, broken)


@pytest.mark.parametrize("part, change, sentence", [
    ("text_config", {"num_attention_heads": 2}, "num_attention_heads 4, got 2"),
    ("text_config", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06, got 1e-05"),
    ("text_config", {"rope_parameters": {"rope_theta": 12.0, "rope_type": "default"}},
     "rope_theta 100.0, got 12.0"),
    ("vision_config", {"hidden_act": "relu"}, "the vision tower's hidden_act gelu, got relu"),
    ("", {"image_token_id": 6}, "image_token_id 5, got 6"), ("", {"vision_feature_layer": -2}, "-1, got -2")])
def test_a_vlm_that_fits_but_computes_something_else_is_refused(broken: Path, part: str, change: dict,
                                                                sentence: str) -> None:
    path = broken / "vlm" / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{path} is of another model: expected .*{sentence}"):
        ParaUni.from_parts(NANO, broken)


def test_a_vlm_of_another_size_or_damaged_is_refused(broken: Path) -> None:
    large = replace(NANO, vlm=VLMConfig())
    with pytest.raises(ValueError, match="another preset: expected 28 layers of width 1536, got 8 of 128; "
                                         "change --preset or --weights"):
        ParaUni.from_parts(large, broken)
    path = broken / "vlm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path} is truncated .*: fetch it again"):
        ParaUni.from_parts(NANO, broken)


# ----------------------------------------------------------------------------- sizes

def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name, parameters", [("b-512", 938_193_024), ("l-512", 2_088_957_440)])
def test_full_size_vlms_have_the_published_parameters(name: str, parameters: int) -> None:
    vlm = on_meta(lambda: build_vlm(PRESETS[name].vlm))
    assert count(vlm) == parameters and PRESETS[name].vlm.image_tokens == 256
    assert vlm.lm_head.weight is not vlm.get_input_embeddings().weight and vlm.dtype == torch.bfloat16
    text = vlm.config.text_config
    assert text.hidden_size // text.num_attention_heads == {"b-512": 64, "l-512": 128}[name]
    assert (text.rms_norm_eps, text.max_position_embeddings) == (1e-6, 32768)
    assert (vlm.config.image_token_id, vlm.config.image_seq_length) == (151667, 256)


def test_embeddings_and_head_of_the_vlm_are_two_tensors() -> None:
    """Tied, the head that is loaded last would overwrite the embeddings."""
    vlm = build_vlm(VLMConfig(width=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=32,
                              vocab_size=96, context=64, image_token_id=5, image_size=32, patch_size=4,
                              vision_width=32, vision_layers=1, vision_heads=2, vision_mlp_width=32))
    state = {name: torch.full_like(p, float(i)) for i, (name, p) in enumerate(vlm.state_dict().items())}
    vlm.load_state_dict(state)
    assert all(torch.equal(p, state[name]) for name, p in vlm.state_dict().items())


@pytest.mark.parametrize("name, dit, lim, latent", [
    ("nano", None, None, (8, 8, 8)),
    ("b-512", 591_747_872, 54_660_608, (32, 16, 16)),
    ("l-512", 1_604_462_752, 225_844_992, (32, 16, 16)),
    ("l-1024", 1_604_641_952, 225_844_992, (32, 32, 32))])
def test_presets_fit_together_and_have_the_published_sizes(name: str, dit: int | None, lim: int | None,
                                                           latent: tuple) -> None:
    preset = PRESETS[name]
    assert preset.latent_shape == latent and preset.dit.in_channels == preset.vae.latent_channels
    assert preset.lim.width == preset.vlm.width and preset.lim.caption_channels == preset.dit.caption_channels
    if dit:
        assert count(on_meta(lambda: DiT(preset.dit))) == dit
        queries = preset.num_queries * preset.vlm.width
        assert queries + count(on_meta(lambda: LIM(preset.lim))) == lim + 2 * 2304      # LN of Eq. 4 on top


def test_preset_defaults_are_the_papers() -> None:
    paper = PRESETS["l-1024"]
    assert (paper.image_size, paper.num_queries, paper.train_tokens) == (1024, 256, 128)
    assert (paper.dit, paper.lim) == (DiTConfig(), LIMConfig())
    assert replace(paper.vlm, dtype="float32") == VLMConfig()
