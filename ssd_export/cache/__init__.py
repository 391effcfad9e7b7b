"""Cache policies as data (policy, table, layout, head_map: no torch) and their torch reference (the
rest).
"""
