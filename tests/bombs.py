"""Chat templates that a stranger could write: what each would cost or see, and what is said of it."""

BOMBS = {
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "2 s of processor time",
    ),
    "power": ("{{ 10 ** (10 ** 10) }}", "2 s of processor time|512 MiB of memory"),
    "length": ("{{ 'a' * 10 ** 9 }}", "512 MiB of memory"),
    "doubling": (
        "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
        "512 MiB of memory",
    ),
    "size": ("{% for i in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}", "16 million characters"),
    "width": ("{{ '%999999999d' % 1 }}", "512 MiB of memory"),
    "range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion without an end"),
    "nesting": ("{{" + "(" * 9999 + "1" + ")" * 9999 + "}}", "recursion without an end"),
    "class": ("{{ ''.__class__.__mro__ }}", "forbidden in a template"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "forbidden in a template"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1).x.y }}", "forbidden in a template|undefined"),
    "change": ("{{ messages.append(1) }}", "forbidden in a template"),
    "include": ("{% include '/etc/passwd' %}", "refused by the template"),
    "draws": ("{{ lipsum() }}", "'lipsum' is undefined"),
}
