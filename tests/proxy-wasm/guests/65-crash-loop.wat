(on request_headers (call $log @hit@) unreachable)
