(on request_headers (call $say @reply@ (call $reply #403 @no@)) #1)
(on request_body (call $two @body@ (local.get $n) (local.get $eos)) #0)
