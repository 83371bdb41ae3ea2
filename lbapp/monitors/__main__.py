# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m lbapp.monitors``: the process that checks members. The controller starts it."""

from lbapp.monitors.process import main

main()
