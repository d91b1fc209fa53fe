"""Two processes make the run that one process makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from mmalign.runtime.log import read_jsonl
from trainers import checkpoint, entry
from trainers.config import CalibrationConfig
from trainers.pair_config import PairConfig
from trainers.panel_config import PanelConfig

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainers import entry
from vision_rewards.function import FunctionReward

def brightness(media, prompts):
    return media.flatten(1).mean(1)

reward = FunctionReward(brightness, takes="tensor")
odd, *matched, even = (entry.resolve_recipe(file) for file in sys.argv[1:])
trainer = entry.build(odd, Path(odd.output_dir), reward)
share = Path(odd.output_dir).parent / f"share_{trainer.accelerator.process_index}"
share.write_text(str(len(trainer.rollouts.sample(0)[0])))
assert trainer.accelerator.init_handler.timeout == entry.PATIENCE
trainer.run()
for recipe in matched:
    own = None if isinstance(recipe.reward, dict) else reward
    entry.build(recipe, Path(recipe.output_dir), own).run()
entry.train(even, reward=reward)  # its end is the end of the process group
"""


NAMES = ["odd", "even", "torn", "old", "dense", "noise", "value", "guided", "placed"]
NAMES += ["liked", "own", "banked", "subject", "d3po", "spo", "prdp", "leap", "match"]
NAMES += ["wins"]


def labelled(base: Path) -> Path:
    """Four pairs of pictures of one colour."""
    folder, lines = base / "labelled", []
    folder.mkdir(exist_ok=True)
    for n in range(4):
        names = [f"{n}_{side}.png" for side in "ab"]
        for name, level in zip(names, (250 - 10 * n, 20 + 5 * n), strict=True):
            Image.new("RGB", (32, 32), (level, 90, 90)).save(folder / name)
        row = {"prompt": f"a photo of {n}", "image_a": names[0], "image_b": names[1], "label": "a"}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def recipes(kit, base: Path) -> list:
    """9 images of which the 2 extremes of each prompt are trained on; 8 with a KL and guidance; two
    objectives of the forward process; an advantage for every step, with found noise; noise that is
    learned; a critic of shares of different sizes, once of win rates; guided rollouts; region
    scores; a mean over everyone; 3 labelled pairs of which 2 processes replace some by their own; a
    subject; and two that have something learn beside the policy. One labelled pair is held out,
    which one process measures for both."""
    common = {"model__adapter": "lora", "model__lora_rank": 4, "optim__lr": 1e-3, "steps": 2}
    odd = {"prompts_per_step": 3, "images_per_prompt": 3, "advantage__keep": 2}
    even = {"objective": {"kl_beta": 0.1}, "rollout__guidance_scale": 2.0, "model__ema_decay": 0.5}
    # Its last look asks to stop, which all processes must hear of.
    even["panel"] = PanelConfig(
        judges=("jpeg_compressibility",), every=2, prompts=4, samples=2, diversity="off",
        probes={"sharpness": "low"}, stop_when={"velocity": 1e-12},
    )  # fmt: skip
    split = {"optim__updates_per_rollout": 2}
    matching = {"rollout__kernel": "ode", "forward__draws": 2}
    # Groups of 3 that are kept whole: one for the first process, two for the second.
    torn = {"prompts_per_step": 3, "images_per_prompt": 3, "algorithm": "dgpo", **matching}
    old = {"algorithm": "diffusion_nft", "objective": {"old_decay": {"rate": 0.2, "cap": 0.5}}}
    dense = {"prompts_per_step": 3, "images_per_prompt": 3, "algorithm": "dense_grpo"}
    dense |= {"rollout__calibration": CalibrationConfig(rounds=2), "rollout__steps": 4}
    learned = {"kernel": "learned", "kernel_options": {"per_channel": True}}
    noise = {
        "algorithm": "reinflow",
        "objective": {"noise_lr": 0.05, "clip_range": 0.2},
        "optim__updates_per_rollout": 2,
    }
    noise |= {f"rollout__{key}": value for key, value in learned.items()}
    value = {"prompts_per_step": 3, "images_per_prompt": 3, "algorithm": "dpok"}
    value |= {"objective": {"critic": {"updates": 3}}}
    # A score among three pictures of a prompt, which must not be shared out one by one.
    wins = {**value, "reward": {"compose": "win_rate", "parts": ["contrast"]}}
    guided = {"algorithm": "euphonium", "rollout__kernel": "dance_sde"}
    guided |= {"objective": {"process_reward": "contrast", "strength": 1.0, "distill": 1.0}}
    # Noise shows no objects, whose maps are 0: what moves the weights is the constraint.
    regions = {"region_reward": "shapes_partial", "constraint": "target"}
    placed = {"algorithm": "srum", "objective": regions, **matching}
    liked = {"prompts_per_step": 3, "images_per_prompt": 3, "algorithm": "diffusion_kto"}
    liked |= {"objective": {"beta": 10.0}, **matching}
    rounds = {"round_steps": 1, "self_share": 0.67, "candidates": 2, "score_draws": 1}
    own = {"prompts_per_step": 3, "images_per_prompt": 2, "algorithm": "sail", **matching}
    pairs = PairConfig(data=str(labelled(base)), validation=0.25, validate_every=1)
    own |= {"objective": {"beta": 10.0, **rounds}, "pairs": pairs}
    banked = {**own, "algorithm": "diffusion_dpo", "objective": {"beta": 10.0}}
    banked |= {"pairs": PairConfig(data=str(labelled(base)), reference_bank=4)}
    subject = {**own, "algorithm": "rpo", "pairs": None}
    subject |= {"objective": {"beta": 10.0, "references": str(labelled(base))}}
    whole = {"prompts_per_step": 3, "images_per_prompt": 3}
    student = {**whole, **matching, "forward__guidance_scale": 1.0}
    student["rollout__spacing"] = "even"
    leap = {**student, "algorithm": "rg_lcd", "objective": {"proxy": {"updates": 2}}}
    match = {**student, "algorithm": "dmd", "forward__times": "grid"}
    match |= {"rollout__kernel": "consistency", "objective": {"fake": {"updates": 2, "lr": 1e-3}}}
    return [
        kit.cheap(base / "odd", **common, **odd),
        kit.cheap(base / "torn", **common, **torn),
        kit.cheap(base / "old", **common, **old, **matching, **split),
        kit.cheap(base / "dense", **common, **dense),
        kit.cheap(base / "noise", **common, **noise),
        kit.cheap(base / "value", **common, **value),
        kit.cheap(base / "wins", **common, **wins),
        kit.cheap(base / "guided", **common, **guided),
        kit.cheap(base / "placed", **common, **placed),
        kit.cheap(base / "liked", **common, **liked),
        kit.cheap(base / "own", **common, **own),
        kit.cheap(base / "banked", **common, **banked),
        kit.cheap(base / "subject", **common, **subject),
        kit.cheap(base / "leap", **common, **leap),
        kit.cheap(base / "match", **common, **match),
        # Whole prompts: one for the first process, two for the second.
        kit.cheap(
            base / "d3po", algorithm="d3po", **common, **whole, objective={"pairing": "neighbours"}
        ),
        kit.cheap(base / "spo", algorithm="spo", **common, **whole),
        kit.cheap(base / "prdp", algorithm="prdp", **common, **whole, optim__updates_per_rollout=3),
        kit.cheap(base / "even", **common, **even, **split),
    ]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pair(kit, tmp_path_factory) -> SimpleNamespace:
    """Folders of the same two runs, made by one process and by two."""
    torch.set_num_threads(1)
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    files = []
    for config in recipes(kit, two):
        files.append(two / f"{Path(config.output_dir).name}.yaml")
        files[-1].write_text(dump_yaml(config))
    script = two / "run.py"
    script.write_text(SCRIPT)
    root = str(Path(entry.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launcher = "accelerate.commands.accelerate_cli"
    # Without --multi_gpu accelerate starts one process only, as it does for --cpu; the recipe says
    # device: cpu, which makes it a gloo group whatever the machine has.
    options = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port())]
    command = [sys.executable, "-m", launcher, *options, str(script), *map(str, files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    *others, even = recipes(kit, one)
    for config in others:
        own = None if isinstance(config.reward, dict) else kit.brightness
        entry.build(config, Path(config.output_dir), own).run()
    entry.train(even, reward=kit.brightness)
    return SimpleNamespace(one=one, two=two)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of the newest checkpoint."""
    file = checkpoint.existing(folder / "checkpoints")[-1] / checkpoint.FILE
    return torch.load(file, weights_only=True)["model"]["weights"]


def test_both_processes_took_part(pair):
    shares = {p.name: p.read_text() for p in pair.two.glob("share_*")}
    assert shares == {"share_0": "4", "share_1": "5"}
    run = json.loads((pair.two / "even" / "run.json").read_text())
    assert run["processes"] == 2 and run["finished"] is True


@pytest.mark.parametrize("name", NAMES)
def test_weights_agree(pair, name):
    one, two = weights(pair.one / name), weights(pair.two / name)
    start = {n: v for n, v in one.items() if "lora_B" in n}
    assert all(v.abs().max() > 1e-4 for v in start.values())  # B starts at 0: it has moved
    assert one.keys() == two.keys()
    # In double precision all agree to 1e-12: what is left is rounding. A process decodes batches of
    # another size, and a gain is a difference of nearly equal rewards. Elsewhere some gradients are
    # of rounding's size too, which Adam turns into a share of its rate of 1e-3: another micro-batch
    # on one process moves them as far, up to 5e-5 on the processors that were tried.
    known = {"dense": 1e-5, "value": 3e-5, "d3po": 1e-5, "match": 1e-5}
    known |= dict.fromkeys(("noise", "liked", "own", "banked"), 1e-4)
    slack = known.get(name, 1e-6)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=slack, msg=key)


def test_latents_are_encoded_by_both_and_held_out_pairs_measured(pair):
    """Each picture once: one process writes one file, two write half each."""
    files = [
        sorted((base / "own" / "latents").rglob("*.safetensors")) for base in (pair.one, pair.two)
    ]
    rows = [sorted(len(load_file(f)["rows"]) for f in part) for part in files]
    assert rows == [[8], [4, 4]]
    for base in (pair.one, pair.two):
        assert all("held_out/loss" in r for r in read_jsonl(base / "own" / "metrics.jsonl"))


def test_found_noise_agrees(pair):
    one, two = (json.loads((f / "dense" / "noise.json").read_text()) for f in (pair.one, pair.two))
    assert one == two and len(one["levels"]) == 3


def test_learned_noise_and_critic_agree(pair):
    noise = [weights(base / "noise")["kernel.noise"] for base in (pair.one, pair.two)]
    torch.testing.assert_close(noise[1], noise[0], rtol=1e-5, atol=1e-6)
    assert noise[0].std() > 1e-3
    files = (checkpoint.existing(b / "value" / "checkpoints")[-1] for b in (pair.one, pair.two))
    one, two = (torch.load(f / checkpoint.FILE, weights_only=True)["critic"] for f in files)
    assert one["history"]["mean"] == pytest.approx(two["history"]["mean"], rel=1e-6)
    for key, value in one["net"].items():  # rounding of the rewards gives 1e-5 after six steps
        torch.testing.assert_close(two["net"][key], value, rtol=0, atol=1e-4, msg=key)
    assert float(one["net"]["value.2.weight"].abs().max()) > 3e-3  # it started at 0


def test_looks_of_the_panel_agree(pair):
    one, two = (read_jsonl(f / "even" / "panel.jsonl") for f in (pair.one, pair.two))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 2]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a["nfe"] == b["nfe"]
        for name in ("reward", "velocity", "kl"):
            torch.testing.assert_close(
                torch.tensor(b["values"][name]),
                torch.tensor(a["values"][name]),
                rtol=1e-4,
                atol=1e-6,
            )
    stops = [
        json.loads((f / "even" / "run.json").read_text())["stopped"] for f in (pair.one, pair.two)
    ]
    assert all(s.startswith("panel at step 2: predictions are further") for s in stops)


def test_exported_average_agrees(pair):
    file = "even/lora/pytorch_lora_weights.safetensors"
    one, two = load_file(pair.one / file), load_file(pair.two / file)
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_agree(pair, name):
    one, two = (read_jsonl(base / name / "metrics.jsonl") for base in (pair.one, pair.two))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a["nfe"] == b["nfe"] and a["images"] == b["images"]
        # Before the first update a margin over a bank's numbers is rounding, and so is its sign.
        chance = name == "banked" and a["step"] == 1
        for key in a.keys() - {"seconds"}:
            if not (key.startswith("time/") or (chance and "implicit_accuracy" in key)):
                # A critic's targets and errors are differences of rewards that are nearly equal.
                rel = 1e-3 if name == "value" else 1e-4
                assert b[key] == pytest.approx(a[key], rel=rel, abs=2e-6), key
