__version__ = "0.1.0"

from .core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)
