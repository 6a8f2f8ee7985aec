"""What is said where an optional package is missing."""


def missing(package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error to raise where ``package`` could not be imported: it says the cure.

    An error of something else that the package itself lacks is returned as it is.
    """
    if error.name != package:
        return error
    message = (
        f"iresnet_jax.interop.{package} needs the package {package}: "
        "pip install 'iresnet_jax[interop]'."
    )
    return ModuleNotFoundError(message, name=package)
