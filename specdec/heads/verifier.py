"""Which target `speculators` files were made for."""

from specdec.heads.files import HeadFiles, object_in
from specdec.heads.host import Host


def check_verifier(files: HeadFiles, host: Host) -> list[str]:
    """A remark for the start of a run if the files name another target.

    Raises:
        ValueError: they name another architecture.
    """
    wrapper = object_in(files.config, "speculators_config", files.name)
    verifier = object_in(wrapper, "verifier", files.name)
    architectures = [str(name) for name in verifier.get("architectures") or ()]
    # Gemma3ForConditionalGeneration has the texts of Gemma3ForCausalLM.
    families = {name.split("For")[0] for name in architectures}
    if families and host.architecture.split("For")[0] not in families:
        raise ValueError(
            f"{files.name}: is made for {' or '.join(architectures)}, and {host.name} is a "
            f"{host.architecture}: this head belongs to another target"
        )
    name = str(verifier.get("name_or_path") or "")
    last = name.rstrip("/").rsplit("/", 1)[-1].casefold()
    return [] if not last or host.name.casefold().endswith(last) else [f"made for {name}"]
