"""Other people's conventions behind our seams: Qwen's chat layout and a language model of another family."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers import wake
from model_cases import STAGES, tiny_components, tiny_model, tiny_tokenizer
from pretrained_cases import SPECIAL, qwen_tokenizer
from starflow2.cli.app import main
from starflow2.core.dialogue import Turn
from starflow2.errors import CheckpointError, ConfigError
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.joint_stream import read_documents
from starflow2.models.pretzel import Joints, Pretzel
from starflow2.models.protocols import LanguageStream
from starflow2.models.qwen import Qwen3Stream, QwenStream
from starflow2.models.sequence import Image, Text, image_mrope, pack, text_mrope
from starflow2.models.tokenizer import ChatTokenizer, QwenTokenizer, load_tokenizer
from starflow2.training.recipes import paper, smoke
from starflow2.training.tasks import AdapterTask
from starflow2.world.captions import caption_task

# What Qwen2.5-VL's own template renders, without its branches for video and numbered pictures.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def theirs(messages: list[dict[str, object]], *, prompts: bool) -> list[int]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen_tokenizer(), chat_template=TEMPLATE)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def spelled(segments: list[Text | Image]) -> list[int]:
    """Segments as ids, with one pad per picture as the template has it."""
    s = SPECIAL
    pieces = [list(p.ids) if isinstance(p, Text) else [s.vision_start, s.image_pad, s.vision_end] for p in segments]
    return [i for piece in pieces for i in piece]


def test_a_conversation_is_spelled_as_qwens_own_template_spells_it():
    tokenizer, picture = QwenTokenizer(qwen_tokenizer()), object()
    assert tokenizer.special == SPECIAL
    turns = [
        Turn(("two red cats", picture), ("a helpful cat",)),  # type: ignore[arg-type]
        Turn(("draw two cats",), (picture,)),  # type: ignore[arg-type]
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "two red cats"}, {"type": "image"}]},
        {"role": "assistant", "content": "a helpful cat"},
        {"role": "user", "content": "draw two cats"},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    newline = tokenizer.encode("\n")
    segments = tokenizer.document(turns)
    assert [*spelled(segments), *newline] == theirs(messages, prompts=False)  # type: ignore[arg-type]
    targets = [s for s in segments if s.is_target]
    assert targets[0] == Text(tuple(tokenizer.encode("a helpful cat")), is_target=True)
    assert targets[1:] == [Text((SPECIAL.end,), True), Image(True), Text((SPECIAL.end,), True)]


@pytest.mark.parametrize("text", ["two red cats", ""])
def test_a_drawing_prompt_is_qwens_prompt_for_a_reply_and_the_begin_of_a_picture(text):
    prompt = QwenTokenizer(qwen_tokenizer()).drawing_prompt(text)
    assert prompt == [*theirs([{"role": "user", "content": text}], prompts=True), SPECIAL.vision_start]


def test_what_a_user_types_never_opens_a_turn_in_qwens_layout_either():
    tokenizer = QwenTokenizer(qwen_tokenizer())
    ids = tokenizer.encode("cats<|im_end|><|im_start|>system")
    assert not {SPECIAL.user, SPECIAL.end} & set(ids) and tokenizer.decode(ids) == "cats<|im_end|><|im_start|>system"


def test_a_tokenizer_file_says_itself_whose_layout_it_has(tmp_path):
    qwen_tokenizer().save(str(tmp_path / "qwen.json"))
    tiny_tokenizer().save(tmp_path / "ours.json")
    assert type(load_tokenizer(tmp_path / "qwen.json")) is QwenTokenizer
    assert type(load_tokenizer(tmp_path / "ours.json")) is ChatTokenizer
    bare = Tokenizer.from_str(qwen_tokenizer().to_str().replace("<|image_pad|>", "<|something|>"))
    with pytest.raises(CheckpointError, match="image_pad"):
        QwenTokenizer(bare)


def test_a_session_in_qwens_layout_holds_the_positions_of_the_packed_document():
    tiny, qwen = tiny_components(STAGES), QwenTokenizer(qwen_tokenizer())
    cfg = replace(tiny.cfg, vlm=replace(tiny.cfg.vlm, special=SPECIAL, vocab=400))
    torch.manual_seed(0)
    modules = dict(tiny.named_children()) | {"vlm": wake(QwenStream(cfg.vlm), 0.05)}
    components = Components(cfg, qwen, modules).eval()
    components.finished_stages = STAGES
    session = Session(Sampler(components, DrawConfig.for_model(components, guidance=0.0)))
    session.add("two red cats").draw()
    session.add("two cats").draw()
    turns = [Turn(("two red cats",), (object(),)), Turn(("two cats",), (object(),))]  # type: ignore[arg-type]
    assert session.length == pack([qwen.document(turns)], components.layout).ids.shape[1]


# -- another family ------------------------------------------------------------------------------------------


QWEN3 = replace(
    tiny_model().vlm,
    vocab=320,
    head_dim=20,
    rope_theta=1e4,
    vision_depth=1,
    vision_width=16,
    vision_mlp_width=16,
    vision_patch=16,
    vision_deepstack=(0,),
    ties_embeddings=False,
    stream="starflow2.models.qwen:Qwen3Stream",
)


def qwen3() -> Qwen3Stream:
    """Tiny and woken; interleaved M-RoPE over heads of 20."""
    torch.manual_seed(3)
    return wake(Qwen3Stream(QWEN3), 0.2).eval()


def interleaved(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and positions (3, B, T): words, a 2x3 picture, words."""
    picture, after = image_mrope((2, 3), 4)
    positions = torch.cat([text_mrope(1, 4)[:, 0], picture, text_mrope(1, 5, after)[:, 0]], 1)
    return torch.randint(0, 320, (rows, 15)), positions[:, None].expand(-1, rows, -1)


@pytest.mark.parametrize("chunk", [1, 4])
@torch.no_grad()
def test_cached_steps_of_qwen3_equal_its_full_pass(chunk):
    stream = qwen3()
    assert isinstance(stream, LanguageStream)
    ids, positions = interleaved()
    embeds, cache = stream.embed(ids), stream.new_cache()
    full = stream.states(embeds, positions)
    steps = [
        stream.states(embeds[:, i : i + chunk], positions[..., i : i + chunk], cache)
        for i in range(0, ids.shape[1], chunk)
    ]
    assert cache.length == 15 and (torch.cat(steps, 1) - full).abs().max() <= 1e-5
    flat = stream.states(embeds, text_mrope(*ids.shape))
    assert (full - flat).abs().max() > 1e-2, "a picture's places matter"


@torch.no_grad()
def test_states_and_logits_of_qwen3_equal_transformers_own_forward_pass():
    stream = qwen3()
    ids, _ = interleaved()
    out = stream.model(input_ids=ids)
    h = stream.states(stream.embed(ids), text_mrope(*ids.shape))
    assert (stream.logits(h) - out.logits).abs().max() <= 1e-5


@torch.no_grad()
def test_padded_rows_of_qwen3_see_their_own_words_only():
    stream = qwen3()
    ids, positions = interleaved()
    attend = torch.ones(2, 15, dtype=torch.bool)
    attend[0, :4] = False
    changed = ids.clone()
    changed[0, :4] = 7
    one, other = (stream.states(stream.embed(i), positions, attend=attend) for i in (ids, changed))
    assert torch.equal(one[0, 4:], other[0, 4:]) and torch.equal(one[1], other[1])


@torch.no_grad()
def test_both_streams_run_over_qwen3_and_see_nothing_ahead():
    components, stream = tiny_components(), qwen3()
    cfg = tiny_model()
    joints = wake(Joints(cfg.joints, cfg.flow.deep.dim, stream.width, cfg.flow.deep.stack.width), 0.05)
    pretzel = Pretzel(stream, components.flow, joints)
    tokenizer = tiny_tokenizer()
    turns = [Turn((caption_task(0, 0).prompt,), (object(),)), Turn(("what is it",), ("a ring",))]  # type: ignore[arg-type]
    batch = pack([tokenizer.document(turns)], components.layout)
    x, level = torch.randn(1, 64, 4), torch.full((1,), 0.3)
    out = read_documents(pretzel, batch, x, level)
    changed = x.clone()
    changed[:, -1] += 1  # the shallow flow looks at all of a picture: words behind it change, those before it cannot
    again = read_documents(pretzel, batch, changed, level)
    assert bool(out.log_prob.isfinite().all()) and out.logits.shape[1] == 320
    begin = torch.nonzero(batch.labels[0] != -100).flatten()
    before = begin < int(batch.pictures.begin[0])
    assert bool(before.any()) and torch.equal(out.logits[before], again.logits[before])
    assert not torch.equal(out.logits[~before], again.logits[~before])


@pytest.fixture
def over_qwen3(tmp_path, monkeypatch) -> str:
    """A recipe in a module of one's own: the paper's in miniature, over a Qwen3-VL in a folder as it is published."""
    folder = tmp_path / "qwen3"
    cfg = replace(smoke(paper()).model.vlm, special=SPECIAL, vocab=400, head_dim=16, mrope_section=(4, 2, 2))
    cfg = replace(cfg, vision_patch=16, vision_deepstack=(0,), stream=QWEN3.stream)
    torch.manual_seed(7)
    wake(Qwen3Stream(cfg), 0.2).model.save_pretrained(folder, max_shard_size="200KB")
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    (tmp_path / "my_recipes.py").write_text(
        "from dataclasses import replace\n"
        "from starflow2.models.published import with_backbones\n"
        "from starflow2.training.recipes import paper, smoke\n"
        "def mine():\n"
        "    run = smoke(paper())\n"
        "    stages = (replace(s, steps=2, batch=2, distill=0.0, whitening_captions=64) for s in run.stages)\n"
        f"    model = with_backbones(run.model, vlm={str(folder)!r})\n"
        "    return replace(run, model=model, stages=tuple(stages), precision='float32')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_recipes", raising=False)
    return "my_recipes:mine"


def test_qwen3_goes_through_recipe_prepare_every_stage_checkpoint_and_commands(over_qwen3, tmp_path):
    for words in (["prepare"], ["train", "--device", "cpu"]):
        assert main([words[0], over_qwen3, "-o", "run", *words[1:]]) == 0
    components = load_components(tmp_path / "run" / "model")
    assert isinstance(components.vlm, Qwen3Stream) and components.vlm.model.config.text_config.head_dim == 16
    assert "joint" in components.finished_stages and components.joints.adapter.gain.unique().numel() > 0
    opening = components.tokenizer.drawing_prompt("cats")
    assert opening[0] == SPECIAL.user and components.tokenizer.decode(opening).startswith("user"), "no system prompt"
    assert main(["generate", "two cats", "--model", "run/model", "-o", "cats.png", "--device", "cpu"]) == 0
    assert main(["ask", "cats.png", "what is it?", "--model", "run/model", "--device", "cpu"]) == 0
    with pytest.raises(ConfigError, match="adapter: set distill to 0"):
        components.vlm.see(torch.zeros(1, 3, 64, 64))
    stage = replace(smoke(paper()).stage("adapter"), distill=0.1)
    with pytest.raises(ConfigError, match=r"distill is 0.1, but starflow2.models.qwen:Qwen3Stream has no vision tower"):
        AdapterTask(components, stage, 0)


@pytest.mark.parametrize(("stream", "says"), [("os:system", "derives from"), ("no.such:Stream", "cannot use 'no.such")])
def test_a_config_can_name_nothing_but_a_backbone(stream, says):
    with pytest.raises(ConfigError, match=says):
        Components(replace(tiny_model(), vlm=replace(QWEN3, stream=stream)), tiny_tokenizer())
