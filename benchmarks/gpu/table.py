"""All rows of a run as one Markdown table."""

FIRST = ('status', 'ms', 'ms_min', 'ratio', 'extra_gb', 'reserved_gb')
# In the name of the case, or of no interest beside the other numbers.
LEFT_OUT = {'part', 'case', 'what', 'end', 'at_s'}


def table(rows: list[dict]) -> str:
    lines = ['| part | case | what | ' + ' | '.join(FIRST) + ' | more |', '|---' * (len(FIRST) + 4) + '|']
    for row in rows:
        if row.get('end') and row['status'] == 'ok':  # only says that the case is done
            continue
        more = ', '.join(f'{key} {_text(value)}' for key, value in row.items() if key not in LEFT_OUT and key not in FIRST)
        cells = [row['part'], row['case'], row.get('what', ''), *(_text(row.get(key, '')) for key in FIRST), more]
        lines.append('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |')
    return '\n'.join(lines) + '\n'


def _text(value) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)
