"""The command line of a run, from the declarations of its options."""

import argparse
import types
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runtime.errors import OneLineParser
from runtime.options import allowed, closest_option, names_of, shown

NULLS = ("none", "null")


def build_parser(program: str, groups: Sequence[type]) -> argparse.ArgumentParser:
    """Return a parser that takes every option of the groups; what is not given is not in its result."""
    parser = OneLineParser(
        prog=program,
        usage="%(prog)s [--OPTION VALUE ...]",
        description="Train and evaluate DeBiFormer, BiFormer and any model of timm.",
        epilog="Without any option: trains debiformer_nano on the digits that come with scikit-learn. "
        "Published recipes: --recipe debiformer_small --data_path ./data/in1k. "
        "Switches take --no_NAME, too. Dashes may stand for underscores.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        hints = get_type_hints(group)
        for spec in fields(group):
            _add_argument(section, spec, hints[spec.name])
    # torch.distributed.launch passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _add_argument(section: Any, spec: Field, hint: Any) -> None:
    default = shown(spec)
    bounds = "" if spec.metadata["choices"] else allowed(spec)  # choices are shown as the option's value
    help = f"{spec.metadata['help']}{bounds}".replace("%", "%%") + (f" (default: {default})" if default else "")
    flag, choices = f"--{spec.name}", spec.metadata["choices"] or None
    hint, optional = _without_none(hint)
    if hint is bool:
        section.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="true|false", help=help)
        section.add_argument(f"--no_{spec.name}", dest=spec.name, action="store_false", help=argparse.SUPPRESS)
    elif get_origin(hint) is list:
        section.add_argument(flag, nargs="+", action=_Numbers, metavar="X", help=help)
    elif get_origin(hint) is dict:
        section.add_argument(flag, nargs="+", action=KeyValues, metavar="NAME=VALUE", help=help)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else hint.__name__.upper()
        section.add_argument(flag, type=_nullable(hint) if optional else hint, metavar=metavar, help=help)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None)), True
    return hint, False


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def _nullable(convert: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() in NULLS else convert(text)

    parse.__name__ = convert.__name__  # argparse names the type in its messages
    return parse


class _Numbers(argparse.Action):
    """--opt_betas 0.9 0.95, or 0.9,0.95, or null."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        words = [word for value in values for word in value.split(",") if word]
        try:
            numbers = None if words[0].lower() in NULLS else [float(word) for word in words]
        except (ValueError, IndexError):
            parser.error(f"argument {option_string}: expected numbers, not {' '.join(values)!r}")
        setattr(namespace, self.dest, numbers)


class KeyValues(argparse.Action):
    """--model_kwargs n_win=8 depths=2,2,9,3: numbers, true, false, null, words; lists of them, with or without []."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        result = dict(getattr(namespace, self.dest, {}))
        for item in values:
            name, separator, text = item.partition("=")
            if not separator:
                parser.error(f"argument {option_string}: expected NAME=VALUE, not {item!r}")
            try:
                result[name] = _plain_value(f"[{text}]" if "," in text and not text.startswith("[") else text)
            except (OmegaConfBaseException, YAMLError):
                parser.error(f"argument {option_string}: cannot read {item!r}; write lists as depths=2,2,9,3")
        setattr(namespace, self.dest, result)


def _plain_value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def with_underscores(arg: str) -> str:
    """--batch-size=8 as --batch_size=8; anything else as it is."""
    if not arg.startswith("--"):
        return arg
    name, separator, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def unknown_option(arg: str, groups: Sequence[type]) -> str:
    """Say what is wrong with an argument that no option takes."""
    if not arg.startswith("--"):
        return f"unexpected argument {arg!r}; options start with --, see --help"
    name = arg.partition("=")[0].removeprefix("--")
    return f"unknown option --{name}; {closest_option(name, names_of(*groups), 'see --help', '--')}"
