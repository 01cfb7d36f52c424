"""Every exception `vtc` raises on purpose: what was got, what was expected, and the fix."""


class VtcError(Exception):
    """Base of all errors of this package: catch this one to catch them all."""


class OptionError(VtcError, ValueError):
    """A method name, a `keep`, an option or its type is not one that exists."""


class UnsupportedModelError(VtcError, TypeError):
    """The model's class, its vision tower or its feature layer is not one that an adapter
    describes."""


class SignalError(VtcError):
    """A method needs something of the model (a [CLS] row, say) that this model cannot give."""


class PatchError(VtcError, RuntimeError):
    """A model is patched twice, or `vtc` is asked to undo a patch that is not there."""


class InputError(VtcError, ValueError):
    """The inputs of one call contradict each other, such as images and placeholders that do not
    match."""


class UnsupportedModeError(VtcError, NotImplementedError):
    """A way of calling the model for which compression would not be right, so it is refused."""


class NeverCompressedError(VtcError, RuntimeError):
    """Images were given, yet the place where the method acts was never reached."""


class SampleError(VtcError, RuntimeError):
    """Some samples of an evaluation failed, so no accuracy is reported."""
