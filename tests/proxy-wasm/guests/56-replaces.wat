(on response_headers
  (call $say @reply@ (call $send_local_response #418 #0 #0 @local@ %x-local=1% #-1))
  #1)
(on response_body (call $two @body@ (local.get $n) (local.get $eos)) #0)
