-- SPDX-FileCopyrightText: The lbapp authors
-- SPDX-License-Identifier: Apache-2.0
-- Prints wrk's result for a program to read: one "result" line, then the latency histogram.
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("result %d %d %d %d %d %d %d %d\n", summary.duration, summary.requests, summary.bytes,
                         e.connect, e.read, e.write, e.status, e.timeout))
  for i = 1, #latency do
    local value, count = latency(i)
    io.write(string.format("bucket %d %d\n", value, count))
  end
end
