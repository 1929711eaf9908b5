"""ParaUni: two passes of the VLM against one, the layers that are read, what is drawn, saved and refused."""
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import Refused, derive_seed
from dit import DiT
from helpers import TINY, TINY_VISION, moved, save_stage, tiny_model
from lim import LIM
from model import IMAGENET_MEAN, IMAGENET_STD, PRESETS, ParaUni, internvl, read_tensors

pytestmark = pytest.mark.usefixtures("tiny_preset")
L, N, D, E = TINY.lim.vlm_layers, TINY.num_queries, TINY.lim.width, TINY.lim.caption_channels
PROMPTS = ["  a heart\n", "a picture of a red heart left of a blue star", None, "two moons"]
IMAGE_TOKEN = TINY.vlm.image_token_id


@pytest.fixture(scope="module")
def model() -> ParaUni:
    """Shared by all tests, which leave it as it is."""
    return tiny_model()


@pytest.fixture
def broken(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of the folder to damage."""
    return shutil.copytree(tiny_weights, tmp_path / "broken")


def pictures(B: int, seed: int = 0) -> Tensor:
    return torch.rand(B, 3, 40, 48, generator=torch.Generator().manual_seed(seed))


def spell(prompt: str | None, picture: bool = False) -> str:
    """The published strings, written out by hand; about a picture, the prompt is a bare instruction."""
    shown = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>\n" if picture else ""
    text = "Generate an image."
    if prompt is not None:
        text = prompt.strip() if picture else f"Generate an image: {prompt.strip()}"
    return f"<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n<img>"


def one_pass(model: ParaUni, prompts: list[str | None], images: Tensor | None) -> tuple[Tensor, Tensor]:
    """The queries' features (L, B, N, D), and their inputs, each prompt with them in one sequence."""
    leaf = model.queries.detach().clone().requires_grad_()
    rows = []
    for b, prompt in enumerate(prompts):
        text = spell(prompt, images is not None)
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False).input_ids])
        embeds = model.vlm.get_input_embeddings()(ids)                                  # (1, S, D)
        if images is not None:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            seen = nn.functional.interpolate(images[b:b + 1], (32, 32), mode="bicubic", antialias=True)
            features = model.vlm.model.get_image_features(pixel_values=(seen.clamp(0, 1) - mean) / std)
            embeds[ids == IMAGE_TOKEN] = features.pooler_output[0]
        whole = torch.cat([embeds, leaf[None]], 1)                                      # (1, S + N, D)
        out = model.vlm.model.language_model(inputs_embeds=whole, use_cache=False, output_hidden_states=True)
        rows.append(torch.stack(out.hidden_states[1:])[:, :, -N:])                      # (L, 1, N, D)
    return torch.cat(rows, 1), leaf


@pytest.mark.parametrize("images", [None, pictures(4)], ids=["words", "pictures"])
def test_prefix_and_queries_equal_one_pass(model: ParaUni, images: Tensor | None) -> None:
    """In value, and in the gradient of the queries."""
    got = model.read_queries(model.encode_prefix(PROMPTS, images))
    want, leaf = one_pass(model, PROMPTS, images)
    assert (got[:, 0] - got[:, 1]).abs().max() > 0.1, "the prompts are heard at all"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    gradient, = torch.autograd.grad((got * weight).sum(), model.queries)
    reference, = torch.autograd.grad((want * weight).sum(), leaf)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


def test_layers_are_the_outputs_of_the_vlms_layers_counted_from_one(model: ParaUni) -> None:
    language, raw = model.vlm.model.language_model, []
    hooks = [layer.register_forward_hook(lambda *call: raw.append(call[-1])) for layer in language.layers]
    one_pass(model, ["a red heart"], None)
    for hook in hooks:
        hook.remove()
    # the last one with the final norm on it
    features = [*raw[:-1], language.norm(raw[-1])]
    c = [model.lim(hidden[None, :, -N:])[0] for hidden in features]
    for layers in ([1], [L], [2, 4], None):
        want = torch.stack([c[i - 1] for i in layers or range(1, L + 1)]).mean(0)
        got = model.condition(["a red heart"], layers=layers)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_long_prompts_are_cut_where_that_is_asked_for(model: ParaUni) -> None:
    short, whole = model.encode_prefix([PROMPTS[1]], max_tokens=8), model.encode_prefix([PROMPTS[1]])
    assert short.mask.shape == (1, 8) and whole.mask.shape[1] > 8
    keys, want = short.keys_values[-1][0], whole.keys_values[-1][0][:, :, :8]
    torch.testing.assert_close(keys, want, rtol=1e-4, atol=1e-4)


def test_a_picture_depends_on_its_seed_and_place_and_not_on_its_batch(model: ParaUni) -> None:
    prompts = ["a heart", "a blue star", "two moons"]
    images = model.generate(prompts, num_steps=3, seed=7)
    assert images.shape == (3, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, model.generate(prompts, num_steps=3, seed=7))
    # the third by itself
    alone = model.generate([prompts[2]], num_steps=3, seed=[derive_seed(7, "picture", 2)])
    torch.testing.assert_close(alone, images[2:], rtol=0, atol=1e-4)
    assert (model.generate(prompts, num_steps=3, seed=8) - images).abs().amax((1, 2, 3)).min() > 0.01


def test_decoding_by_chunks_changes_nothing() -> None:
    model, latents, seen = tiny_model(), torch.randn(5, *TINY.latent_shape), []
    whole = model.decode(latents)
    # as if four megapixels were two pictures
    model.preset = replace(TINY, image_size=1448)
    model.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(model.decode(latents), whole, rtol=0, atol=1e-6)
    assert seen == [2, 2, 1]


def test_guidance_is_against_no_prompt(model: ParaUni, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, condition, prompts, images = [], model.condition, ["a heart", "a star"], pictures(2)
    monkeypatch.setattr(model, "condition", lambda *args: seen.append(args) or condition(*args))
    plain = model.generate(prompts, num_steps=3)
    model.generate(prompts, num_steps=1, images=images, layers=[2])
    assert seen == [(prompts, None, None), ([None], None, None),
                    (prompts, images, [2]), ([None, None], images, [2])]
    for other in ({"guidance_scale": 2.0}, {"solver": "euler"}):
        assert (model.generate(prompts, num_steps=3, **other) - plain).abs().max() > 1e-3


def test_queries_start_as_words_where_the_preset_names_them() -> None:
    model = tiny_model()
    model.preset = replace(TINY, query_words="left is right is")
    model.init_trained(seed=0)
    ids = model.tokenizer.convert_tokens_to_ids(["left", "is", "right", "is"])
    assert torch.equal(model.queries, model.vlm.get_input_embeddings().weight[ids])


def test_answers_are_greedy_and_do_not_depend_on_the_batch() -> None:
    model = tiny_model(seed=2)
    images, questions = pictures(3), ["how many hearts?", "is the star red?", "what color is the ring?"]
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # a picture is likelier than "rings", which it says
    head = model.vlm.lm_head.weight
    head[IMAGE_TOKEN] = 2 * head[model.tokenizer.convert_tokens_to_ids("rings")]
    answers, likeliest = model.answer(images, questions, max_new_tokens=4), []
    for b, question in enumerate(questions):
        row = model.tokenizer(spell(question, True).removesuffix("<img>"), add_special_tokens=False).input_ids
        start, pixels = len(row), model.pixels(images[b:b + 1])
        while len(row) < start + 4 and row[-1] != end:
            with torch.no_grad():
                logits = model.vlm(torch.tensor([row]), pixel_values=pixels).logits[0, -1]
            likeliest.append(int(logits.argmax()))
            # but no answer is a picture
            logits[IMAGE_TOKEN] = -torch.inf
            row.append(int(logits.argmax()))
        assert model.tokenizer.decode(row[start:], skip_special_tokens=True).strip() == answers[b]
    assert len(set(answers)) > 1 and IMAGE_TOKEN in likeliest
    assert model.chat(images[0], questions[0]) == model.answer(images[:1], questions[:1])[0]


def test_the_frozen_parts_stay_in_eval_mode() -> None:
    model = tiny_model().train()
    assert model.dit.training
    assert not any(part.training for frozen in (model.vlm, model.vae) for part in frozen.modules())


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (ParaUni.from_preset("nano", "random", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("queries", "lim.projector.weight", "dit.patch_embed.proj.weight", "vlm.lm_head.weight",
                 "vae.decoder.conv_in.weight"):
        assert not torch.equal(a[name], c[name]), name
    assert abs(a["queries"].std().item() * D ** 0.5 - 1) < 0.3


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kept", [None, torch.rand(L, N, E)], ids=["plain", "kept noise"])
def test_trained_weights_return(stage: int, kept: Tensor | None, tiny_weights: Path, tmp_path: Path) -> None:
    source = moved(tiny_model(), 0.1)
    source.lim.kept_noise = kept
    path = save_stage(source, tmp_path, stage)
    before = ParaUni.from_preset("nano", tiny_weights, "none").state_dict()
    after = ParaUni.from_preset("nano", tiny_weights, path, stage=stage)
    trained = source.trainable(stage)
    for name, p in after.state_dict().items():
        assert torch.equal(p, trained[name] if name in trained else before[name]), name
    assert after.lim.kept_noise is None if kept is None else torch.equal(after.lim.kept_noise, kept)
    assert load_file(path).keys() == trained.keys() | ({"lim.kept_noise"} if kept is not None else set())


def test_a_folder_gives_its_parts_and_its_newest_stage(model: ParaUni, broken: Path) -> None:
    plain = ParaUni.from_preset("nano", broken, "none")
    for part in ("vlm", "dit", "vae"):
        got = getattr(plain, part).state_dict()
        assert all(torch.equal(got[name], p) for name, p in getattr(model, part).state_dict().items())
    newer = moved(tiny_model(), 0.1)
    save_stage(newer, broken, 3)
    assert torch.equal(ParaUni.from_preset("nano", str(broken)).queries, newer.queries)


def edit(path: Path, change: Callable[[dict], object], **metadata: str) -> None:
    """Rewrite a safetensors file with other tensors, or other metadata."""
    tensors, old = read_tensors(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt", **old, **metadata})


@pytest.mark.parametrize("file, harm, words", [
    ("stage1.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    ("stage1.safetensors", lambda path: edit(path, dict, stage="2"), "of stage 2"),
    ("stage1.safetensors", lambda path: edit(path, dict, preset="l-512"), "of l-512"),
    ("stage1.safetensors", lambda path: edit(path, lambda t: t.update(queries=torch.zeros(2, D))), "queries"),
    ("stage1.safetensors", lambda path: edit(path, lambda t: t.update(extra=torch.zeros(1))), "extra"),
    ("transformer/diffusion_pytorch_model.safetensors", lambda path: edit(path, dict.popitem), "1 tensors"),
    ("vae/diffusion_pytorch_model.safetensors", lambda path: edit(path, dict.popitem), "1 tensors"),
    ("vlm", lambda path: path.rename(path.with_name("elsewhere")), "change --weights"),
    ("vlm/model.safetensors", lambda path: edit(path, lambda t: t.update(extra=torch.zeros(1))), "extra"),
    ("vlm/model.safetensors", lambda path: edit(path, lambda t: t.pop("language_model.lm_head.weight")),
     "lm_head.weight"),
    # all fits but its depth
    ("vlm", lambda path: TINY.vlm_class(
        internvl(32, 3, 2, 1, 64, 96, vision=TINY_VISION)).save_pretrained(path), "width 32, 3 layers, $")])
def test_foreign_and_damaged_files_are_refused(broken: Path, file: str, harm: Callable, words: str) -> None:
    harm(broken / file)
    with pytest.raises(Refused, match=words) as refused:
        ParaUni.from_preset("nano", broken, broken / "stage1.safetensors", stage=1)
    assert str(broken / Path(file).parts[0]) in str(refused.value)


def test_fresh_lets_some_parameters_start_afresh_and_only_those(broken: Path, tmp_path: Path) -> None:
    path, fresh = broken / "stage1.safetensors", ("lim.projector.",)
    edit(path, lambda t: t.pop("lim.projector.bias"))
    with pytest.raises(Refused, match="lim.projector.bias"):
        ParaUni.from_preset("nano", broken, path)
    # what was trained with the flag says so, and is read without it
    own = save_stage(ParaUni.from_preset("nano", broken, path, fresh=fresh), tmp_path)
    edit(own, lambda t: t.pop("lim.projector.bias"))
    ParaUni.from_preset("nano", broken, own)
    for harm in (lambda t: t.pop("queries"), lambda t: t.update({"lim.projector.bias": torch.zeros(2)})):
        shutil.copy(broken / "stage2.safetensors", path)
        edit(path, harm)
        with pytest.raises(Refused):
            ParaUni.from_preset("nano", broken, path, fresh=fresh)


def test_precision_of_the_parts_in_memory(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VLM's is the preset's, the autoencoder's that of its file, of what is trained the caller's."""
    for file in ("vlm/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        edit(broken / file, lambda t: t.update({name: p.bfloat16() for name, p in t.items()}))
    half = ParaUni.from_preset("nano", broken)
    assert (half.vlm.dtype, half.vae.encoder.conv_in.weight.dtype) == (torch.float32, torch.bfloat16)
    assert {p.dtype for p in half.trainable(3).values()} == {torch.float32}
    monkeypatch.setitem(PRESETS, "nano", replace(TINY, vlm_dtype=torch.bfloat16))
    half = ParaUni.from_preset("nano", broken, dtype=torch.bfloat16)
    assert {p.dtype for p in (*half.vlm.parameters(), *half.trainable(3).values())} == {torch.bfloat16}


def count(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize("name, vlm, dit, lim, latent", [
    ("b-512", 938_193_024, 591_747_872, 54_660_608, (32, 16, 16)),
    ("l-512", 2_088_957_440, 1_604_462_752, 225_844_992, (32, 16, 16)),
    ("l-1024", 2_088_957_440, 1_604_641_952, 225_844_992, (32, 32, 32))])
def test_presets_have_the_published_sizes(name: str, vlm: int, dit: int, lim: int, latent: tuple) -> None:
    preset = PRESETS[name]
    assert (preset.latent_shape, preset.num_queries, preset.train_tokens) == (latent, 256, 128)
    for wrong in ({"vlm_layers": 29}, {"width": 1000}):
        with pytest.raises(AssertionError, match="one width and one number of layers"):
            replace(preset, lim=replace(preset.lim, **wrong))
    assert preset.lim.caption_channels == preset.dit.caption_channels and preset.stage_dtype.itemsize == 4
    if name != "l-512":
        assert count(lambda: preset.vlm_class(preset.vlm)) == vlm
    assert count(lambda: DiT(preset.dit)) == dit
    # OpenUni's queries and connector, and the LN of Eq. 4 on top
    assert 256 * preset.lim.width + count(lambda: LIM(preset.lim)) == lim + 2 * 2304
    baseline = PRESETS[f"openuni-{name}"]
    assert baseline.lim == replace(preset.lim, layers=(preset.lim.vlm_layers,), norm=False)
    assert baseline.dit == preset.dit
