"""What is said where an optional package is missing."""


def missing(package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error to raise where ``package``, or what it needs, is missing: with the cure."""
    message = (
        f"iresnet_jax.interop.{package} needs {package}: pip install 'iresnet_jax[interop]'. "
        f"({error})"
    )
    return ModuleNotFoundError(message, name=error.name)
