(on request_headers
  (call $say @reply@ (call $send_local_response #403 #0 #0 @body@ %content-length=100;:status=200;content-type=text/html;x-dup=1;x-dup=2% #-1))
  #1)
