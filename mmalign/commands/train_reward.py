"""``mmalign train-reward``."""

from __future__ import annotations

from argparse import Namespace


def run(args: Namespace) -> int:
    """Train a reward model as a YAML file and overrides say; continues an interrupted run."""
    from mmalign.config import apply_overrides, dump_yaml, from_dict, load_yaml
    from vision_rewards.training.config import RewardTrainConfig

    files = [a for a in args.overrides if "=" not in a]
    if len(files) > 1:
        from mmalign.commands.common import CommandError

        raise CommandError(f"one configuration file at most, got {', '.join(files)}")
    mapping = load_yaml(files[0]) if files else {}
    mapping = apply_overrides(mapping, [a for a in args.overrides if "=" in a])
    if args.output_dir is not None:
        mapping["output_dir"] = args.output_dir
    config = from_dict(RewardTrainConfig, mapping)
    if args.show:
        print(dump_yaml(config), end="")
        return 0
    from vision_rewards.training.train import summary, train_reward

    train_reward(config, resume=not args.no_resume)
    print(summary(config.output_dir))
    return 0
