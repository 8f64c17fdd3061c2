"""Reading the layers of a tower as if each were the last."""

FORMS = ("raw", "corrected", "tuned")
