"""Everything about text: tasks, tokenizers, downloads. UserError lives here because every file
imports downwards to it.
"""


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to type instead.

    main() of each program prints it without a traceback and exits with status 2.
    """
