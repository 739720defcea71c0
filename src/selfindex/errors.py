"""The exceptions of selfindex. Each says what was wrong and what to do about it."""


class SelfIndexError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(SelfIndexError, ValueError):
    """An option is out of its range or contradicts another one."""


class InputError(SelfIndexError, ValueError):
    """A tensor handed to the cache has the wrong shape, dtype, device or content."""


class UnsupportedModelError(SelfIndexError, ValueError):
    """The model uses attention that this cache cannot represent."""


class StateError(SelfIndexError, RuntimeError):
    """A call came in an order, or on a cache, that cannot give a right answer."""


class FormatError(SelfIndexError, ValueError):
    """Encoded bytes, a format name or a profile file that cannot be read."""


class HostMemoryError(SelfIndexError, MemoryError):
    """An offloaded cache needs more host memory than there is or can be pinned."""


class DeviceError(SelfIndexError, RuntimeError):
    """The GPU has failed in this process: what it holds cannot be trusted, nothing more can run on it."""
