(on request_body (call $two @body@ (local.get $n) (local.get $eos)) #1)
(on request_trailers
  (call $num @trailers@ (local.get $n))
  (call $show @body@ (call $body #0 #1000))
  (call $say @append@ (call $set #0 #-1 #0 @<end>@))
  #0)
(on response_body (call $two @response body@ (local.get $n) (local.get $eos)) #1)
(on response_trailers
  (call $num @response trailers@ (local.get $n))
  (call $show @response body@ (call $body #1 #1000))
  (call $say @append@ (call $set #1 #-1 #0 @<end>@))
  #0)
