(on request_headers (call $num @request@ (local.get $eos)) #0)
(on request_body (call $two @request body@ (local.get $n) (local.get $eos)) #0)
(on response_headers (call $num @response@ (local.get $eos)) #0)
(on response_body (call $two @response body@ (local.get $n) (local.get $eos)) #0)
